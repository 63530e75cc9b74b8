"""A run's folder: atomic files, log and metrics, trackers, signals, failures.

Other rooms import: failures, files, folders, run_folder, runlog, stopping, tracking, writer.
"""
