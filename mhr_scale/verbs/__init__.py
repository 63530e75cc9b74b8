"""The verbs: each one function that reads as its stages."""
