"""A run's folder: its owner, atomic files, log and metrics, trackers, signals, failures.

Other rooms import: failures, files, folders, ownership, run_folder, runlog, stopping, tracking,
writer.
"""
