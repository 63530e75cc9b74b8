"""T0's mixtures, prompts and held-out tasks: readers of P3, promptsource and raw data sets.

Other rooms import: held_out, mixtures.
"""
