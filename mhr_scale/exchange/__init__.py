"""Stock PEFT and transformers: what they load of ours, and what we train with them.

Other rooms import: reloading, stock.
"""
