"""Rows through the model: losses, validation, ranked choices, generated answers.

Other rooms import: few_shot_loss, losses, scoring, validation.
"""
