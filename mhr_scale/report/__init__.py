"""One HTML file about runs of any kind.

Other rooms import: build, page, runs, scored_adapters.
"""
