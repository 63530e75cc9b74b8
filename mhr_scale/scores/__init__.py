"""Questions to the model, summaries of their scores, comparisons of few-shot jobs.

Other rooms import: comparison, questions, summary.
"""
