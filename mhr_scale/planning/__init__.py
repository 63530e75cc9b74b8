"""What a run would take: memory and time per placement, counted on the program itself.

`tracing` runs a step on tensors without memory and counts; `steps` says which step; `placements`
where the frozen weights lie; `hardware` on what; `cost` puts them together.

Other rooms import: hardware, kinds, printed, wave_size.
"""
