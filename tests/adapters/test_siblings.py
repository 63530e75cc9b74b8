"""Linears that share an input and run together: the same as one by one, with less dispatched."""

import contextlib

import pytest
import torch
from tiny import (
    TASKS,
    Recorder,
    attach_copy,
    gradients,
    logits,
    make_batch,
    make_t5,
    randomise,
)

from mhr_scale.adapters import AdapterConfig, attach, detach
from mhr_scale.adapters.linear import Siblings
from mhr_scale.config import BackboneConfig
from mhr_scale.families.t5_fused import install

METHODS = {
    "LoRA": {"n_skills": 1, "rank": 3},
    "MHR": {"n_skills": 3, "n_splits": 4, "rank": 2},
    "ia3": {"kind": "ia3", "n_skills": 3, "n_splits": 4},
}
#: Siblings per layout in two encoder and two decoder blocks, and linears in all of them.
LAYOUTS = {
    "full": (2 * 2 + 2 * 3, 2 * 5 + 2 * 7),
    "light": (2 * 2 + 2 * 3, 2 * 5 + 2 * 7),
    "attention": (2 * 1 + 2 * 2, 2 * 3 + 2 * 5),
}
ROWS = {"one task": (1, 1, 1, 1), "even": (2, 2, 0, 0), "ragged": (2, 0, 2, 1)}
EXACT = BackboneConfig(name="x", fused_attention=True, fused_gate=False, fused_norm=False)
FUSED = BackboneConfig(name="x")
UNGATED = {"feed_forward_proj": "relu"}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=ROWS)
def task_ids(request):
    return ROWS[request.param]


def make_pair(config, dtype=torch.float64, switches=EXACT, **changes):
    """A model whose linears run together, and one in which they do not; the same adapter."""
    together, alone = (make_t5(**changes).to(dtype).train() for _ in range(2))
    install(together, switches)
    adapter = randomise(attach(together, config, tasks=TASKS).to(dtype))
    return (together, adapter), (alone, attach_copy(alone, adapter))


def siblings_of(model):
    return [module for module in model.modules() if isinstance(module, Siblings)]


# -- the same results ------------------------------------------------------------------------------


def check_as_one_by_one(together, alone, task_ids):
    torch.testing.assert_close(
        logits(*together, task_ids), logits(*alone, task_ids), rtol=1e-12, atol=1e-12
    )
    found, expected = gradients(*together, task_ids), gradients(*alone, task_ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_outputs_and_gradients_are_those_of_linears_one_by_one(method, layout, task_ids):
    check_as_one_by_one(*make_pair(AdapterConfig(layout=layout, **method)), task_ids)


@pytest.mark.parametrize("layout", ["full", "light"])
def test_an_ungated_feed_forward_gives_the_same_too(layout):
    pair = make_pair(AdapterConfig(layout=layout, **METHODS["MHR"]), **UNGATED)
    check_as_one_by_one(*pair, ROWS["ragged"])


@pytest.mark.parametrize("layout", ["full", "light"])
def test_generated_answers_are_those_of_linears_one_by_one(method, layout):
    together, alone = make_pair(AdapterConfig(layout=layout, **method))
    batch = make_batch(4)
    del batch["labels"]
    found = []
    for model, adapter in (together, alone):
        model.eval()
        with torch.no_grad(), adapter.slots(ROWS["ragged"], rows_per_example=3):
            found.append(model.generate(**batch, num_beams=3, max_new_tokens=6))
    assert torch.equal(*found)


def test_autocast_reaches_siblings(method):
    together, alone = make_pair(AdapterConfig(**method), dtype=torch.float32)
    found = []
    for model, adapter in (together, alone):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients(model, adapter, ROWS["ragged"]))
    assert {tensor.dtype for tensor in found[0].values()} == {torch.float32}
    for name, expected in found[1].items():
        assert (found[0][name] - expected).norm() < 0.1 * expected.norm()


def test_a_backbone_that_trains_gets_its_gradients_through_siblings():
    together, alone = make_pair(AdapterConfig(**METHODS["MHR"]))
    found = []
    for model, adapter in (together, alone):
        model.requires_grad_(True)
        gradients(model, adapter, ROWS["ragged"])
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(bool(tensor.any()) for tensor in found[0].values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-12)


# -- the module tree -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_siblings_are_the_linears_of_one_input(layout):
    (model, _), _ = make_pair(AdapterConfig(layout=layout))
    found = siblings_of(model)
    assert (len(found), sum(len(one.members) for one in found)) == LAYOUTS[layout]


def test_siblings_may_have_members_without_an_adapter():
    (model, _), _ = make_pair(AdapterConfig(layout="light"))
    adapted = {(len(one.members), len(list(one.adapted()))) for one in siblings_of(model)}
    assert adapted == {(3, 2), (2, 1), (2, 2)}  # q of q, k, v; wi_0 of wi_0, wi_1; all of k, v


def test_an_ungated_feed_forward_has_no_siblings():
    (model, _), _ = make_pair(AdapterConfig(), **UNGATED)
    assert not any("wi" in one.name for one in siblings_of(model))


def test_weights_keep_their_names(layout):
    (together, _), (alone, _) = make_pair(AdapterConfig(layout=layout))
    names = [[name for name, _ in model.named_parameters()] for model in (together, alone)]
    assert names[0] == names[1]


def test_detaching_restores_the_module_tree(layout):
    model = make_t5()
    install(model, FUSED)
    before = dict(model.named_modules())
    with torch.no_grad():
        expected = model(**make_batch(4)).logits
    adapter = attach(model, AdapterConfig(layout=layout), tasks=TASKS)
    detach(model)
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not any(linear.siblings for linear in adapter.linears)
    with torch.no_grad():
        assert torch.equal(model(**make_batch(4)).logits, expected)


def test_another_adapter_may_follow_on_other_linears():
    model = make_t5()
    install(model, FUSED)
    attach(model, AdapterConfig(layout="full"), tasks=TASKS)
    detach(model)
    attach(model, AdapterConfig(layout="light"), tasks=TASKS)
    assert len(siblings_of(model)) == LAYOUTS["light"][0]


@pytest.mark.parametrize(("name", "layout"), [*zip(METHODS, LAYOUTS, strict=True)])
def test_off_reaches_siblings(name, layout):
    (model, adapter), _ = make_pair(AdapterConfig(layout=layout, **METHODS[name]))
    with torch.no_grad(), adapter.off():
        found = model(**make_batch(4)).logits
    detach(model)
    with torch.no_grad():
        torch.testing.assert_close(found, model(**make_batch(4)).logits, rtol=0, atol=0)


# -- what is dispatched ----------------------------------------------------------------------------

#: The benchmark's backbone, in small: 108 adapted linears, 8 distinct tasks.
DEEP = {"num_layers": 6, "num_decoder_layers": 6}
MANY = tuple(f"task {number}" for number in range(313))
IN_BATCH = (5, 17, 40, 77, 123, 200, 250, 300)
N_LINEARS, MOST_EXTRA = 108, 8


def record(run_loss, run_backward):
    """What a step dispatches on its way forward and on its way back."""
    with Recorder() as forward:
        loss = run_loss()
    with Recorder() as backward:
        run_backward(loss)
    return forward, backward


def count_frozen(batch):
    """The frozen fused backbone, gradients passing through to the embedded inputs."""
    model = make_t5(**DEEP).bfloat16().train().requires_grad_(False)
    install(model, FUSED)
    embed = model.get_input_embeddings()
    inputs = embed(batch["input_ids"]).requires_grad_()
    targets = embed(model._shift_right(batch["labels"])).requires_grad_()
    given = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    return record(
        lambda: model(inputs_embeds=inputs, decoder_inputs_embeds=targets, **given).loss,
        lambda loss: loss.backward(),
    )


@contextlib.contextmanager
def adapted_step(config, batch, task_ids=IN_BATCH):
    """The two halves of a step of an adapter over the same backbone, its slots being filled."""
    model = make_t5(**DEEP).bfloat16().train()
    install(model, FUSED)
    adapter = attach(model, config, tasks=MANY)
    adapter.row_gradients = True
    filled = []

    def forward():
        filled.append(adapter.slots(task_ids))
        filled[0].__enter__()
        return model(**batch).loss

    yield len(adapter.linears), forward, lambda loss: filled[0].backward(loss)
    filled[0].__exit__(None, None, None)


def extra_of(ours, frozen, what):
    """How many more operations a direction has, for each adapted linear."""
    totals = [[getattr(one, what).total() for one in step] for step in (ours, frozen)]
    return [(mine - bare) / N_LINEARS for mine, bare in zip(*totals, strict=True)]


@pytest.mark.parametrize("n_splits", [1, 8], ids=["Poly", "MHR"])
def test_few_operations_are_added_per_adapted_linear_and_none_waits_for_the_device(n_splits):
    batch = make_batch(len(IN_BATCH))
    frozen = count_frozen(batch)
    with adapted_step(AdapterConfig(n_splits=n_splits), batch) as (n_linears, forward, backward):
        ours = record(forward, backward)
    assert n_linears == N_LINEARS
    assert max(extra_of(ours, frozen, "kernels")) <= MOST_EXTRA / 2
    # with views, which launch nothing: fewer forward, more backward
    assert sum(extra_of(ours, frozen, "operations")) / 2 <= MOST_EXTRA
    waits = [[one.count(Recorder.SYNCS) for one in step] for step in (ours, frozen)]
    assert waits[0] == waits[1]


def test_the_number_of_tasks_in_a_batch_adds_no_operation():
    batch = make_batch(len(IN_BATCH))
    totals = []
    for task_ids in (IN_BATCH, sorted(IN_BATCH[:2] * 4)):
        with adapted_step(AdapterConfig(), batch, task_ids) as (_, forward, backward):
            totals.append([one.operations.total() for one in record(forward, backward)])
    assert totals[0] == totals[1]
