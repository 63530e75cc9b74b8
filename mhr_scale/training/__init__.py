"""The training loop, its optimizers, saved steps, and opening a training run.

Other rooms import: checkpoint, opening, optim, saved_steps, starting, trainer.
"""

#: Settings that may differ when a run resumes: where and how fast, not what.
FREE = (
    "run.ds_config",
    "run.save_every",
    "run.keep",
    "run.keep_best",
    "run.log_every",
    "run.validate_every",
    "run.timeout_seconds",
    "run.folder",
    "batch.micro_batch_size",
    "batch.workers",
    "run.token_cache",
    "run.trackers",
    "backbone.mapped",
    "backbone.recompute",
    "monitor.alignment_every",
    "monitor.alignment_tasks",
    "monitor.alignment_rows",
)
