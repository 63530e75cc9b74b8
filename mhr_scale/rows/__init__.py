"""From texts to token ids to batches: tokenised once, batched, distributed to ranks.

Other rooms import: batching, encode, tokens.
"""
