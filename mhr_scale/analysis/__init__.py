"""What an adapter has learned: gradient alignment, routing, inventory.

Other rooms import: alignment, inventory_statistics, monitor, printed, routing_statistics.
"""

#: The file that an analysis lies in, and the version of what it says.
ANALYSIS = "analysis.json"
SCHEMA = 1
