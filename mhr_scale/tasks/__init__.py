"""Examples and where they come from: suites, the mixture of their tasks, metrics.

Other rooms import: json_lines, jsonl, loaded_metrics, metrics, mixture, suite, suites, superni,
tabular, task, toy.
"""
