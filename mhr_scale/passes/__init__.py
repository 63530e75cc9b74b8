"""Rows through the model: losses, validation, ranked choices, generated answers."""
