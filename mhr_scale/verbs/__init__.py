"""The verbs, one module each; `command`, the one way into them; `launching`, what each launch does.

The package itself and the launch stubs come in here. Other rooms import: command.
"""
