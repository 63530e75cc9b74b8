"""Few-shot jobs: many independent fine-tunings that share passes of one frozen backbone.

A job is (task, seed, variant), with its own trainable tensors, data order, learning rate, clipping
and best checkpoint. A wave is a group of jobs that step together: an adapter whose tasks are the
jobs, so that each batch row uses its job's slot.

Other rooms import: adapt_inputs, finetune_inputs, folder, job, open_waves, runner, scheduling,
served_loras, soup, start, wave.
"""
