"""Where frozen weights come from: hub, files, ties, conversion, quantising, the tokenizer.

Other rooms import: blueprint, conversion, fingerprint, hub, manifest, merging, of_adapter,
quantise, shards, tokenizer, weights.
"""
