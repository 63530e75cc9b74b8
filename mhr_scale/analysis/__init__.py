"""What an adapter has learned: gradient alignment, routing, inventory.

Other rooms import: alignment, analysis_table, clusters, inventory_statistics, monitor,
routing_statistics.
"""

#: The file that holds an analysis, and the version of its format.
ANALYSIS = "analysis.json"
SCHEMA = 1
