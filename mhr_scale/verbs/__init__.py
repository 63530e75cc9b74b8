"""The verbs, one module each, and `launching`, which runs them from the command line.

No other room imports from here: the launch stubs do.
"""
