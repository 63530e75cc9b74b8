"""CrossFit: 160 few-shot tasks with seven metrics, and the partitions that part them.

Other rooms import: metrics, partitions, tasks.
"""
