"""Reading a recipe: strict YAML, overrides on the command line, hints for what is misspelt.

Other rooms import: part, reading, strict_yaml, typed.
"""
