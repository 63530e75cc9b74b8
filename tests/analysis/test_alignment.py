"""Gradient alignment against its definition written out, and what measuring leaves behind."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_subjects import CONFIGS, NAMES, direct_cosines, make_setup

from mhr_scale.analysis import alignment
from mhr_scale.analysis.alignment import cosines, fixed_rows, gather_alignment, mean_of_pairs
from mhr_scale.config import AdapterConfig, BatchConfig, JsonlTasks
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.families.modes import set_recompute
from mhr_scale.families.t5 import GATED
from mhr_scale.rows.tokens import open_tokens


@pytest.mark.parametrize("method", CONFIGS)
def test_cosines_are_those_of_gradients_computed_task_by_task(method: str) -> None:
    setup = make_setup(CONFIGS[method])
    found = gather_alignment(setup.source, setup.tasks)
    expected = direct_cosines(setup)
    assert found.tasks == NAMES
    np.testing.assert_allclose(found.matrix, expected, atol=1e-6)
    assert found.mean == pytest.approx(expected[np.triu_indices(4, 1)].mean(), abs=1e-6)


@pytest.mark.parametrize("method", ["MHR", "(IA)3"])
def test_layers_and_linears_are_their_own_gradients(method: str) -> None:
    setup = make_setup(CONFIGS[method])
    found = gather_alignment(setup.source, setup.tasks)
    block = tuple(s.name for s in setup.adapter.sites if s.name.startswith("decoder.block.1."))
    pairs = np.triu_indices(4, 1)
    layer = direct_cosines(setup, linears=block)[pairs].mean()
    assert found.layers["decoder.block.1"] == pytest.approx(layer, abs=1e-6)
    linear = direct_cosines(setup, linears=block[-1:])[pairs].mean()
    assert found.linears[block[-1]] == pytest.approx(linear, abs=1e-6)
    blocks = [f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in range(2)]
    assert list(found.layers) == blocks
    assert list(found.linears) == [site.name for site in setup.adapter.sites]


def test_the_matrix_is_exactly_symmetric_with_a_diagonal_of_one() -> None:
    setup = make_setup(CONFIGS["MHR"])
    matrix = gather_alignment(setup.source, setup.tasks).matrix
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(np.diag(matrix), np.ones(4))


def test_passes_of_other_sizes_and_rows_seen_twice_change_nothing() -> None:
    setup = make_setup(CONFIGS["MHR"])
    once = gather_alignment(setup.source, setup.tasks)
    larger = gather_alignment(replace(setup.source, micro_batch_size=5), setup.tasks)
    first, *rest = setup.tasks
    twice = gather_alignment(setup.source, [replace(first, rows=first.rows * 2), *rest])
    np.testing.assert_allclose(larger.matrix, once.matrix, atol=1e-6)
    np.testing.assert_allclose(twice.matrix, once.matrix, atol=1e-6)


def test_a_gradient_is_the_mean_per_target_token_of_the_inventory_alone() -> None:
    setup = make_setup(CONFIGS["MHR"])
    parameters = list(setup.adapter.inventory.parameters())
    first = setup.tasks[0]
    doubled = replace(first, rows=first.rows * 2)
    with torch.enable_grad():
        once, twice = (
            alignment.reduce_gradient(setup.source, task, parameters) for task in (first, doubled)
        )
    assert len(once) == sum(parameter.numel() for parameter in parameters)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-9)


def test_a_loss_scaled_by_any_positive_number_has_the_same_alignment() -> None:
    rng = np.random.default_rng(0)
    g = rng.normal(size=(5, 40))
    scales = np.array([1e-9, 0.3, 1.0, 17.0, 1e8])[:, None]
    expected = cosines(g @ g.T)
    np.testing.assert_allclose(cosines((g * scales) @ (g * scales).T), expected, atol=1e-12)


def test_the_mean_is_over_pairs_of_different_tasks() -> None:
    g = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    root = 2.0**-0.5
    assert mean_of_pairs(cosines(g @ g.T)) == pytest.approx((root + 1.0 + root) / 3)


def test_a_task_with_a_zero_gradient_is_left_out_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup = make_setup(CONFIGS["Poly"])
    everything = gather_alignment(setup.source, setup.tasks)
    assert setup.adapter.routing_logits is not None
    with torch.no_grad():
        setup.adapter.routing_logits[1] = -torch.inf  # no skill at all
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        found = gather_alignment(setup.source, setup.tasks)
    assert found.left_out == {"copy": "zero"}
    assert "task 'copy' is left out: its gradient is zero" in caplog.text
    kept = [0, 2, 3]
    np.testing.assert_allclose(found.matrix, everything.matrix[np.ix_(kept, kept)], atol=1e-12)


def test_a_task_whose_loss_is_no_number_is_left_out_by_name() -> None:
    setup = make_setup(CONFIGS["Poly"])
    assert setup.adapter.routing_logits is not None
    with torch.no_grad():
        setup.adapter.routing_logits[2] = torch.nan
    found = gather_alignment(setup.source, setup.tasks)
    assert found.left_out == {"drop": "not finite"}
    assert found.mean is not None
    assert np.isfinite(found.matrix).all()


def test_without_two_directions_there_is_no_mean() -> None:
    setup = make_setup(CONFIGS["LoRA"])
    with torch.no_grad():
        for parameter in setup.adapter.inventory.parameters():
            parameter.zero_()
    found = gather_alignment(setup.source, setup.tasks)
    assert (found.mean, found.tasks, len(found.left_out)) == (None, (), 4)
    assert set(found.layers.values()) == {None}


def test_a_layer_without_a_direction_has_no_mean_and_the_others_have() -> None:
    found = cosines(np.diag([0.0, 1.0, 4.0]))
    assert np.isnan(found[0]).all()
    assert mean_of_pairs(found) == 0.0
    assert mean_of_pairs(cosines(np.diag([0.0, 1.0]))) is None


def test_measuring_leaves_no_gradient_no_setting_and_no_random_number_behind() -> None:
    setup = make_setup(replace(CONFIGS["MHR"], policy="noisy"))
    setup.source.placed.model.train()
    before = {name: p.detach().clone() for name, p in setup.adapter.named_parameters()}
    needed = {name: p.requires_grad for name, p in setup.adapter.named_parameters()}
    state = torch.random.get_rng_state()
    gather_alignment(setup.source, setup.tasks)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in setup.adapter.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == needed[name]
        assert torch.equal(parameter, before[name])


def test_dropout_and_routing_noise_are_off() -> None:
    learned, noisy = (
        make_setup(replace(CONFIGS["MHR"], policy=policy)) for policy in ("learned", "noisy")
    )
    for module in noisy.source.placed.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    noisy.source.placed.model.train()
    expected = gather_alignment(learned.source, learned.tasks).matrix
    assert np.array_equal(gather_alignment(noisy.source, noisy.tasks).matrix, expected)


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_blocks_that_recompute_give_the_same_cosines_and_do_recompute(mode: str) -> None:
    setup, other = make_setup(CONFIGS["MHR"]), make_setup(CONFIGS["MHR"])
    model = other.source.placed.model
    set_recompute(model, mode)
    calls = []
    block = model.get_submodule("encoder.block.0.layer.0")
    block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    expected = gather_alignment(setup.source, setup.tasks).matrix
    np.testing.assert_allclose(
        gather_alignment(other.source, other.tasks).matrix, expected, atol=1e-9
    )
    assert len(calls) == 2 * 3 * len(NAMES)  # three passes per task, each run twice


def test_a_uniform_policy_and_an_average_are_measured_like_any_shared_inventory() -> None:
    setup = make_setup(replace(CONFIGS["MHR"], policy="uniform"))
    found = gather_alignment(setup.source, setup.tasks)
    np.testing.assert_allclose(found.matrix, direct_cosines(setup), atol=1e-6)


def test_private_inventories_are_refused_with_the_reason() -> None:
    setup = make_setup(AdapterConfig(n_skills=1, private=True))
    with pytest.raises(AdapterError, match="an inventory of its own"):
        gather_alignment(setup.source, setup.tasks)


def test_gradients_that_memory_cannot_hold_are_refused_before_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = make_setup(CONFIGS["LoRA"])
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(RunError, match="compare fewer tasks"):
        gather_alignment(setup.source, setup.tasks)


# -- tasks and rows --------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one id per letter."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def __len__(self) -> int:
        return 200

    def get_vocab(self) -> dict[str, int]:
        return {}


@pytest.fixture
def rows_folder(tmp_path: Path) -> JsonlTasks:
    """Task `held` has held-out rows, task `only` has none."""
    row = '{{"id": "{0}", "input": "{0}", "target": "{0}"}}\n'
    for task, fold, names in (
        ("held", "train", "abc"),
        ("held", "validation", "xyz"),
        ("only", "train", "pqr"),
    ):
        (tmp_path / task).mkdir(exist_ok=True)
        (tmp_path / task / f"{fold}.jsonl").write_text("".join(row.format(n) for n in names))
    return JsonlTasks(suite="jsonl", folder=str(tmp_path))


def test_rows_are_the_first_held_out_ones_or_else_training_rows(
    rows_folder: JsonlTasks, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = open_tokens(rows_folder, Letters(), BatchConfig(), GATED)
    with caplog.at_level(logging.INFO, logger="mhr_scale"):
        tasks = fixed_rows(tokens, [0, 1], rows=2, numbers={"held": 7, "only": 0})
    letters = {t.name: "".join(chr(p.input_ids[0]) for p in t.rows) for t in tasks}
    train = "".join(chr(row.input_ids[0]) for row in tokens.train[1])
    held = "".join(chr(row.input_ids[0]) for row in tokens.validation[0])
    assert letters == {"held": held[:2], "only": train[:2]}
    assert [row.task for task in tasks for row in task.rows] == [7, 7, 0, 0]
    assert "training rows, for want of held-out ones, of only" in caplog.text


def test_tasks_with_fewer_rows_than_asked_for_are_named(
    rows_folder: JsonlTasks, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = open_tokens(rows_folder, Letters(), BatchConfig(), GATED)
    with caplog.at_level(logging.INFO, logger="mhr_scale"):
        tasks = fixed_rows(tokens, [0], rows=100)
    assert len(tasks[0].rows) == len(tokens.validation[0])
    assert "fewer than 100 rows of held" in caplog.text


def test_the_sample_of_tasks_is_a_function_of_its_seed() -> None:
    sample = alignment.sample_tasks
    assert sample(5, None, seed=0) == sample(5, 9, seed=0) == [0, 1, 2, 3, 4]
    assert sample(100, 6, seed=1) == sample(100, 6, seed=1) != sample(100, 6, seed=2)
    assert sample(100, 6, seed=1) == sorted(set(sample(100, 6, seed=1)))
