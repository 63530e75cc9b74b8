"""From answers to scores: questions, summaries, comparisons."""
