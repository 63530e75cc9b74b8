"""Stock PEFT and transformers: checks of exported folders, and training with stock parts.

Other rooms import: reloading, serving, stock.
"""
