"""Processes and placement of the backbone; the only room that imports DeepSpeed.

Other rooms import: check_backbone, ds_config, engine, nvme, opened, prefetching.
"""
