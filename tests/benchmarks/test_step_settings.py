"""Batches of the benchmark of a step."""

from step_time_ways import N_TASKS, Setting


def test_rows_of_large_batches_are_of_as_many_tasks_of_the_table() -> None:
    tasks = Setting(rows=64).task_ids
    assert len(set(tasks)) == 64
    assert max(tasks) < N_TASKS
