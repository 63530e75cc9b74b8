"""The verbs: each one function that reads as its stages; and what every launch stub does.

No other room imports from here: the launch stubs do.
"""
