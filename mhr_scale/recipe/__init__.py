"""Reading a recipe: strict YAML, command-line overrides, and hints for misspelt settings.

Other rooms import: part, reading, strict_yaml, typed.
"""
