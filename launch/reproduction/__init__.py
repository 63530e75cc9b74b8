"""The paper's claims at small scale: what is run, how it is compared, what comes out.

`study_suites` lists the methods, `study_tasks` picks the tasks, `units_to_run` lists the units of
work, `units` runs one and `pool` all of them, `rates` chooses learning rates, `results` reads files
into measures, `statistics` and `claims` compare them, `tables` prints; `study` is the whole.
"""
