"""A run's folder: files that appear whole, log and metrics, trackers, signals, failures."""
