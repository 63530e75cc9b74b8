"""The training loop, its optimizers, saved steps, and opening a run.

Other rooms import: checkpoint, opening, optim, trainer.
"""
