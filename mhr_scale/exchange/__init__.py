"""Stock PEFT and transformers: checks of exported folders, and training with stock parts.

Other rooms import: export_record, model_card, reloading, stock.
"""
