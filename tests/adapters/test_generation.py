"""Generation with a task per example, greedy and with beams."""

import pytest
import torch
from tiny import TASKS, attach_copy, make_adapted, make_batch, make_t5

from mhr_scale.adapters import AdapterConfig
from mhr_scale.adapters.collapse import collapse

TASK_IDS = (2, 0, 2, 1, 3)
OPTIONS = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "three-beams": {"num_beams": 3, "do_sample": False},
}
CONFIGS = {
    "Poly": AdapterConfig(n_skills=3, rank=2),
    "MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2),
    "private": AdapterConfig(n_skills=1, rank=2, private=True),
    "ia3": AdapterConfig(kind="ia3", layout="light", n_skills=3, n_splits=4),
}


def generate(model, adapter, rows, task_ids, **options):
    batch = make_batch(len(TASK_IDS))
    beams = options.get("num_beams", 1)
    with torch.no_grad(), adapter.slots(task_ids, rows_per_example=beams):
        return model.generate(
            input_ids=batch["input_ids"][rows],
            attention_mask=batch["attention_mask"][rows],
            max_new_tokens=8,
            min_new_tokens=8,
            no_repeat_ngram_size=1,  # random weights repeat one token otherwise
            **options,
        )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_mixed_batch_equals_each_example_under_its_tasks_collapsed_adapter(config, options):
    model, adapter = make_adapted(config)
    model.eval()
    together = generate(model, adapter, slice(None), TASK_IDS, **options)
    apart = []
    for row, task in enumerate(TASK_IDS):
        single_model = make_t5().double().eval()
        single = attach_copy(single_model, collapse(adapter, TASKS[task]))
        apart.append(generate(single_model, single, slice(row, row + 1), [0], **options))
    assert together.tolist() == torch.cat(apart).tolist()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_task_decides_what_is_generated(options):
    model, adapter = make_adapted(CONFIGS["MHR"])
    model.eval()
    found = {
        str(generate(model, adapter, slice(None), [task] * len(TASK_IDS), **options).tolist())
        for task in range(len(TASKS))
    }
    assert len(found) == len(TASKS)
