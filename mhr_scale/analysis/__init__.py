"""What an adapter has learned: gradient alignment, routing, inventory."""
