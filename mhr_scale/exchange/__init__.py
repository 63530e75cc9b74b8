"""What speaks to other libraries: PEFT, transformers' Trainer, lm-evaluation-harness.

Exported folders are checked and trained with stock parts; PEFT's LoRAs become inventories.

Other rooms import: export_record, from_peft, harness, model_card, reloading, routed_trainer,
serving, stock.
"""
