"""The training loop, its optimizers, saved steps, and opening a run."""
