"""Processes and placement of the backbone; the only room that imports DeepSpeed.

Other rooms import: check_backbone, determinism, ds_config, engine, nvme, opened, prefetching.
"""
