"""From answers to scores: questions, summaries, comparisons.

Other rooms import: comparison, questions, summary.
"""
