"""Reading a recipe: strict YAML, command-line overrides, and hints for misspelt settings.

Other rooms import: part, reading, settings, shipped, strict_yaml, typed.
"""
