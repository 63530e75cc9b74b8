"""A run's folder: its owner, atomic files, log and metrics, trackers, signals, failures.

Other rooms import: extras, failures, files, folders, launch_environment, ownership, repositories,
run_folder, runlog, stopping, streams, tables, tensors, trackers, tracking, writer.
"""
