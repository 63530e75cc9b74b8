"""Passes through the model: losses, validation, ranking of choices, generation of answers.

Other rooms import: few_shot_loss, filled, losses, scoring, validation.
"""
