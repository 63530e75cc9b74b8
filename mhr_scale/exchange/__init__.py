"""What speaks to other libraries: PEFT, transformers' Trainer, lm-evaluation-harness.

Exported folders are checked and trained with stock parts; PEFT's LoRAs become inventories.

Other rooms import: from_peft, harness, reloading, routed_trainer, stock.
"""
