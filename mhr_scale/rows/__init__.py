"""From texts to token ids to batches: tokenised once, cut, dealt to ranks."""
