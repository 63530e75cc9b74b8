"""What a run would take: memory and time per placement, counted on the program itself.

`tracing` runs code on fake tensors and counts bytes and operations; `steps` defines the counted
steps; `lengths` how long their rows are; `placements` where the frozen weights are; `hardware` the
machines; `cost` turns counts into estimates; `kinds` makes a plan for each kind of recipe;
`wave_size` sizes few-shot waves.

Other rooms import: hardware, kinds, plan_table, wave_size.
"""
