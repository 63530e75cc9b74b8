"""A run's folder: files that appear whole, log and metrics, trackers, signals, failures.

Other rooms import: failures, files, folders, run_folder, runlog, stopping, tracking, writer.
"""
