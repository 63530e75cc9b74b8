"""From texts to token ids to batches: tokenised once, cut, dealt to ranks.

Other rooms import: batching, encode, tokens.
"""
