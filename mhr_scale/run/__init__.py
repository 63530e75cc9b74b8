"""A run's folder: atomic files, log and metrics, trackers, signals, failures.

Other rooms import: failures, files, folders, launch_environment, run_folder, runlog, stopping,
streams, tracking, writer.
"""
