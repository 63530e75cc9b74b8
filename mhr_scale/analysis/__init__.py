"""What an adapter has learned: gradient alignment, routing, inventory."""

#: The file that an analysis lies in, and the version of what it says.
ANALYSIS = "analysis.json"
SCHEMA = 1
