"""Entering, using and leaving slots; attaching and detaching an adapter."""

import pytest
import torch
from tiny import TASKS, Recorder, gradients, logits, make_adapted, make_batch, make_t5, tensors_of

from mhr_scale.adapters import Adapter, AdapterConfig, attach, detach, find_sites
from mhr_scale.errors import AdapterError

MHR = AdapterConfig(n_skills=3, n_splits=4, rank=2)
TASK_IDS = (2, 0, 2, 1)


@pytest.fixture
def adapted():
    return make_adapted(MHR)


def bare_logits(model):
    with torch.no_grad():
        return model(**make_batch(len(TASK_IDS))).logits


# --- outside of slots


def test_a_forward_without_slots_names_the_way_out(adapted):
    model, _ = adapted
    with pytest.raises(AdapterError) as caught:
        model(**make_batch(4))
    assert "has no slots: call the model inside `with adapter.slots(task_ids)`" in str(caught.value)


def test_slots_end_with_their_block(adapted):
    model, adapter = adapted
    logits(model, adapter, TASK_IDS)
    with pytest.raises(AdapterError, match="has no slots"):
        model(**make_batch(4))


def test_slots_end_when_their_block_fails(adapted):
    model, adapter = adapted
    with pytest.raises(ZeroDivisionError), adapter.slots(TASK_IDS):
        _ = 1 / 0
    logits(model, adapter, TASK_IDS)


def test_nested_slots_are_refused(adapted):
    _, adapter = adapted
    with (
        adapter.slots(TASK_IDS),
        pytest.raises(AdapterError, match="in use already"),
        adapter.slots(TASK_IDS),
    ):
        pass


def test_refused_nested_slots_leave_the_outer_ones_in_use(adapted):
    model, adapter = adapted
    expected = logits(model, adapter, TASK_IDS)
    with torch.no_grad(), adapter.slots(TASK_IDS):
        with pytest.raises(AdapterError), adapter.slots([0]):
            pass
        assert torch.equal(model(**make_batch(4)).logits, expected)


def test_backward_outside_the_block_is_refused(adapted):
    model, adapter = adapted
    with adapter.slots(TASK_IDS) as slots:
        loss = model(**make_batch(4)).loss
    with pytest.raises(AdapterError, match="inside its own `with` block"):
        slots.backward(loss)


@pytest.mark.parametrize("layout", ["full", "light"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_backward_pass_past_the_slots_is_refused(kind, layout):
    model, adapter = make_adapted(AdapterConfig(kind=kind, layout=layout, n_skills=1))
    with adapter.slots(TASK_IDS):
        loss = model(**make_batch(4)).loss
        with pytest.raises(AdapterError, match=r"call slots\.backward\(loss\) inside"):
            loss.backward()
        later = model(**make_batch(4)).loss
    with pytest.raises(AdapterError, match=r"call slots\.backward\(loss\) inside"):
        later.backward()
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert all(tensor.any() for tensor in gradients(model, adapter, TASK_IDS).values())


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_frozen_adapter_lets_gradients_through_to_the_inputs(kind):
    model, adapter = make_adapted(AdapterConfig(kind=kind, n_skills=1))
    adapter.requires_grad_(False)
    batch = make_batch(4)
    states = model.shared(batch.pop("input_ids")).requires_grad_()
    with adapter.slots(TASK_IDS):
        model(inputs_embeds=states, **batch).loss.backward()
    assert bool(states.grad.any())


def test_fewer_names_than_rows_are_refused(adapted):
    model, adapter = adapted
    with (
        adapter.slots(["copy", "sort"]),
        pytest.raises(AdapterError, match="got 4 rows under slots made for 2 examples; give one"),
    ):
        model(**make_batch(4))


# --- the bare backbone


def test_off_is_the_bare_backbone_bit_for_bit(adapted):
    model, adapter = adapted
    with adapter.off():
        found = bare_logits(model)
    detach(model)
    assert torch.equal(found, bare_logits(model))


def test_off_ends_with_its_block(adapted):
    model, adapter = adapted
    expected = logits(model, adapter, TASK_IDS)
    with adapter.off():
        pass
    assert torch.equal(logits(model, adapter, TASK_IDS), expected)


def test_off_inside_slots_is_the_bare_backbone(adapted):
    model, adapter = adapted
    with adapter.off():
        expected = bare_logits(model)
    with adapter.slots(TASK_IDS), adapter.off():
        assert torch.equal(bare_logits(model), expected)


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(n_skills=1),
        MHR,
        AdapterConfig(n_skills=3, policy="noisy"),
        AdapterConfig(n_skills=3, policy="random"),
        AdapterConfig(n_skills=1, private=True),
        AdapterConfig(kind="ia3", n_skills=1),
    ],
    ids=["LoRA", "MHR", "noisy", "random", "private", "ia3"],
)
def test_a_new_adapter_changes_nothing_bit_for_bit(config):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_t5().to(dtype)
        expected = bare_logits(model)
        adapter = attach(model, config, tasks=TASKS)
        assert torch.equal(logits(model, adapter, TASK_IDS), expected), dtype


# --- attaching and detaching


def test_attaching_freezes_the_backbone(adapted):
    model, _ = adapted
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_adapter_is_no_part_of_the_model(adapted):
    model, adapter = adapted
    own = {id(parameter) for parameter in adapter.parameters()}
    assert not any(id(parameter) in own for parameter in model.parameters())


def test_a_second_adapter_is_refused(adapted):
    model, _ = adapted
    with pytest.raises(AdapterError, match="has adapters already"):
        attach(model, MHR, tasks=TASKS)


def test_detaching_puts_the_linears_back(adapted):
    model, _ = adapted
    detach(model)
    assert {name for name, _ in model.named_modules()} == {
        name for name, _ in make_t5().named_modules()
    }


def test_a_detached_adapter_refuses_slots(adapted):
    model, adapter = adapted
    detach(model)
    with pytest.raises(AdapterError, match="sits in no model"):
        adapter.slots([0])


def test_an_adapter_that_was_never_attached_refuses_slots():
    adapter = Adapter(MHR, find_sites(make_t5(), MHR.layout), task_names=TASKS)
    with pytest.raises(AdapterError, match="sits in no model"):
        adapter.slots([0])


@pytest.mark.parametrize("tasks", [(), ("copy", "sort", "copy")])
def test_task_names_must_be_there_and_differ(tasks):
    with pytest.raises(AdapterError, match="task names must be unique"):
        attach(make_t5(), MHR, tasks=tasks)


def test_the_seed_decides_the_initial_tensors():
    first, same, other = (attach(make_t5(), MHR, tasks=TASKS, seed=s) for s in (3, 3, 4))
    assert tensors_of(first).keys() == tensors_of(other).keys()
    for name, tensor in tensors_of(first).items():
        assert torch.equal(tensor, tensors_of(same)[name])
        assert torch.equal(tensor, tensors_of(other)[name]) == name.startswith("inventory.B_")


# --- tasks


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (["sort", "revers"], "task 'revers' is not in this adapter; did you mean 'reverse'?"),
        (["sort", "zzz"], "task 'zzz' is not in this adapter"),
        ([0, 4], "task id 4 is not in 0..3"),
        ([0, -1], "task id -1 is not in 0..3"),
        (torch.tensor([0, 4]), "task id 4 is not in 0..3"),
        (torch.tensor([0, 1], device="meta"), "task ids lie on meta"),
        ([], "no task ids: give one per example"),
    ],
    ids=["misspelt", "unknown", "too-large", "negative", "tensor", "on-a-device", "empty"],
)
def test_task_ids_the_adapter_cannot_use_are_refused(adapted, task_ids, message):
    _, adapter = adapted
    with pytest.raises(AdapterError) as caught:
        adapter.slots(task_ids)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "task_ids",
    [["sort", "copy", "sort", "reverse"], torch.tensor(TASK_IDS)],
    ids=["names", "tensor"],
)
def test_names_and_tensors_mean_the_same_tasks_as_numbers(adapted, task_ids):
    model, adapter = adapted
    found = logits(model, adapter, task_ids)
    assert torch.equal(found, logits(model, adapter, TASK_IDS))


def test_the_number_of_seeds_must_be_that_of_the_examples(adapted):
    _, adapter = adapted
    with pytest.raises(AdapterError, match="3 seeds for 4 examples"):
        adapter.slots(TASK_IDS, seeds=[1, 2, 3])


# --- forward and backward of a whole model


def test_a_mixed_batch_equals_its_rows_one_by_one(adapted):
    model, adapter = adapted
    whole = logits(model, adapter, TASK_IDS)
    batch = make_batch(len(TASK_IDS))
    rows = []
    for number, task in enumerate(TASK_IDS):
        with torch.no_grad(), adapter.slots([task]):
            row = {name: tensor[number : number + 1] for name, tensor in batch.items()}
            rows.append(model(**row).logits)
    torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-10, atol=1e-10)


def test_tasks_get_different_outputs(adapted):
    model, adapter = adapted
    assert not torch.allclose(logits(model, adapter, [0] * 4), logits(model, adapter, [1] * 4))


def test_gradients_are_those_of_finite_differences(adapted):
    model, adapter = adapted
    found = gradients(model, adapter, TASK_IDS)
    start = tensors_of(adapter)
    generator = torch.Generator().manual_seed(5)
    directions = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in start.items()
    }
    step, values = 1e-3, []  # T5 computes norms and softmax in float32: no smaller steps
    for sign in (1, -1):
        for name, parameter in adapter.named_parameters():
            parameter.data = start[name] + sign * step * directions[name]
        with torch.no_grad(), adapter.slots(TASK_IDS):
            values.append(model(**make_batch(4)).loss.item())
    slope = sum((found[name] * directions[name]).sum().item() for name in found)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-3)


@pytest.mark.parametrize("row_gradients", [False, True], ids=["dense-rows", "sparse-rows"])
def test_gradients_of_two_micro_steps_add_up(adapted, row_gradients):
    model, adapter = adapted
    adapter.row_gradients = row_gradients
    first = gradients(model, adapter, (2, 0), seed=1)
    second = gradients(model, adapter, (0, 3, 1), seed=2)
    for task_ids, seed in (((2, 0), 1), ((0, 3, 1), 2)):
        with adapter.slots(task_ids) as slots:
            slots.backward(model(**make_batch(len(task_ids), seed=seed)).loss)
    expected = {name: first[name] + second[name] for name in first}
    torch.testing.assert_close(
        tensors_of(adapter, gradients=True), expected, rtol=1e-12, atol=1e-14
    )


def test_sparse_row_gradients_are_the_dense_ones(adapted):
    model, adapter = adapted
    dense = gradients(model, adapter, TASK_IDS)
    adapter.row_gradients = True
    with adapter.slots(TASK_IDS) as slots:
        slots.backward(model(**make_batch(4)).loss)
    assert adapter.routing_logits.grad.is_sparse
    assert torch.equal(adapter.routing_logits.grad.to_dense(), dense["routing_logits"])


def test_absent_tasks_have_no_routing_gradient(adapted):
    model, adapter = adapted
    found = gradients(model, adapter, TASK_IDS)["routing_logits"]
    assert [bool(rows.any()) for rows in found] == [True, True, True, False]


def test_frozen_inventory_still_gives_routing_its_gradient(adapted):
    model, adapter = adapted
    expected = gradients(model, adapter, TASK_IDS)["routing_logits"]
    adapter.inventory.requires_grad_(False)
    found = gradients(model, adapter, TASK_IDS)
    assert found.keys() == {"routing_logits"}
    torch.testing.assert_close(found["routing_logits"], expected, rtol=1e-12, atol=1e-14)


def test_frozen_routing_still_gives_the_inventory_its_gradients(adapted):
    model, adapter = adapted
    expected = gradients(model, adapter, TASK_IDS)
    adapter.routing_logits.requires_grad_(False)
    found = gradients(model, adapter, TASK_IDS)
    del expected["routing_logits"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_adapted_model_waits_for_the_device_no_more_than_the_bare_one(adapted):
    model, adapter = adapted
    batch = make_batch(4)
    with adapter.off(), Recorder() as bare:
        model(**batch)
    with adapter.slots(TASK_IDS) as slots, Recorder() as whole:
        slots.backward(model(**batch).loss)
    assert whole.count(Recorder.SYNCS) == bare.count(Recorder.SYNCS)


def test_the_encoder_alone_uses_the_slots(adapted):
    model, adapter = adapted
    batch = make_batch(4)
    with torch.no_grad(), adapter.slots(TASK_IDS):
        whole = model(**batch).encoder_last_hidden_state
        alone = model.encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    assert torch.equal(whole, alone)


def test_answer_choices_are_consecutive_decoder_rows_of_an_example(adapted):
    model, adapter = adapted
    batch = make_batch(4)
    choices = make_batch(12, seed=7)["labels"]
    with torch.no_grad(), adapter.slots(TASK_IDS, rows_per_example=3):
        encoded = model.encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        together = model(
            encoder_outputs=(encoded.repeat_interleave(3, 0),),
            attention_mask=batch["attention_mask"].repeat_interleave(3, 0),
            labels=choices,
        ).logits
    repeated = {name: t.repeat_interleave(3, 0) for name, t in batch.items()} | {"labels": choices}
    with torch.no_grad(), adapter.slots([task for task in TASK_IDS for _ in range(3)]):
        apart = model(**repeated).logits
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)
