"""The training loop, its optimizers, saved steps, and opening a training run.

Other rooms import: checkpoint, opening, optim, starting, trainer.
"""
