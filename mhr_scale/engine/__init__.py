"""Processes and placement of the backbone; the only room that imports DeepSpeed."""
