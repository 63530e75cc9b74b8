"""The frozen backbone: hub and files, ties, conversion, quantisation, merging, the tokenizer.

Other rooms import: blueprint, conversion, fingerprint, hub, identity, manifest, mapped_file,
merging, of_adapter, on_demand, quantise, quantised_parts, shards, tokenizer, weights.
"""
