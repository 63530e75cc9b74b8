"""One's own loop over a causal language model: training, beams, an average that is kept."""

import pytest
import torch
from small_causal import small_causal
from tiny import attach_copy, randomise

from mhr_scale import AdapterConfig, attach, average, collapse, detach, load_adapter, save_adapter

TASKS = ("copy", "sort")
OWNERS = ("copy", "copy", "sort", "sort")
LAYOUTS = {
    "llama": ("q_proj", "v_proj", "up_proj"),
    "opt": ("q_proj", "v_proj", "fc1"),
    "gpt2": "light",
}


def make_batch():
    """Prompts padded on their left, with an answer of three tokens behind each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :4] = 0
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_trains_and_its_average_is_kept(name, tmp_path):
    model = small_causal(name)
    config = AdapterConfig(layout=LAYOUTS[name], rank=2, n_skills=4, n_splits=8)
    adapter = attach(model, config, tasks=TASKS)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-2)
    losses = []
    for _ in range(16):
        with adapter.slots(OWNERS) as slots:
            loss = model(**make_batch()).loss
            slots.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    save_adapter(average(adapter), tmp_path)
    fresh = small_causal(name)
    mean = load_adapter(tmp_path, model=fresh)
    with torch.no_grad(), mean.slots(["average"] * 4):
        assert fresh(**make_batch()).loss < losses[0]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_row_generates_under_its_task(name, beams):
    model = small_causal(name)
    config = AdapterConfig(layout=LAYOUTS[name], rank=2, n_skills=4, n_splits=8)
    adapter = randomise(attach(model, config, tasks=TASKS))
    batch = {key: tensor for key, tensor in make_batch().items() if key != "labels"}
    options = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    options["no_repeat_ngram_size"] = 1  # random weights repeat one token otherwise
    with torch.no_grad(), adapter.slots(OWNERS, rows_per_example=beams):
        found = model.generate(**batch, **options)
    with torch.no_grad(), adapter.slots(OWNERS[::-1], rows_per_example=beams):
        swapped = model.generate(**batch, **options)
    detach(model)
    for task in TASKS:
        rows = [row for row, owner in enumerate(OWNERS) if owner == task]
        single = attach_copy(model, collapse(adapter, task))
        with torch.no_grad(), single.slots([0] * len(rows), rows_per_example=beams):
            own = model.generate(**{key: t[rows] for key, t in batch.items()}, **options)
        assert torch.equal(found[rows], own)
        detach(model)
    assert not torch.equal(found, swapped)
