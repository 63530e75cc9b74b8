"""Saved steps of a run: what goes in comes back, and what is damaged is told."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mhr_scale.adapters import Adapter, artefact, find_sites
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import AdapterConfig, BackboneConfig, OptimConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.training import checkpoint, saved_steps
from mhr_scale.training.optim import has_row_gradients, make_optimizer

pytestmark = pytest.mark.usefixtures("on_cpu")

SIZES = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 1,
    "vocab_size": 32,
    "feed_forward_proj": "gated-gelu",
}
TASKS = ("a", "b", "c")
CONFIG = AdapterConfig(layout="attention", rank=2, n_skills=3, n_splits=2)
OPTIMIZERS = ("adafactor", "adamw")


class Run:
    """An adapter on a tiny frozen model, and its optimizer."""

    def __init__(self, optimizer="adafactor", *, config=CONFIG, tasks=TASKS, seed=0):
        source = BackboneConfig(config=SIZES, dtype="float32")
        self.model = Engine({}, timeout_seconds=60).build(source, read_blueprint(source))
        optim = OptimConfig(name=optimizer, lr=0.01)
        sites, row_gradients = find_sites(self.model, config.layout), has_row_gradients(optim)
        self.adapter = Adapter(
            config, sites, task_names=tasks, seed=seed, row_gradients=row_gradients
        )
        self.adapter.bind(wrap(self.model, sites))
        self.optimizer = make_optimizer(self.adapter, optim)

    def step(self, *tasks):
        """One update from a batch of these tasks."""
        input_ids = torch.arange(2, 2 + 4 * len(tasks)).reshape(len(tasks), 4)
        with self.adapter.slots(tasks) as slots:
            loss = self.model(input_ids=input_ids, labels=input_ids.flip(1), use_cache=False).loss
            slots.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    def save(self, folder, step=2, *, keep=3, **progress):
        return checkpoint.save(
            folder,
            self.adapter,
            checkpoint.optimizer_state(self.adapter, self.optimizer),
            step=step,
            progress=progress,
            backbone={"name": None},
            origin={"verb": "pretrain"},
            keep=keep,
        )

    def load(self, folder, step=2):
        return checkpoint.load(folder, step, self.adapter, self.optimizer)


def trained(optimizer="adafactor", **settings):
    """A run after two steps that did not see task c."""
    return Run(optimizer, **settings).step("a", "b").step("b", "a")


def bits(adapter):
    return {name: tensor.clone() for name, tensor in artefact.named_tensors(adapter).items()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype, name
            assert torch.equal(value, right[name]), name
        else:
            assert (type(value), value) == (type(right[name]), right[name]), name


def optimizer_bits(run):
    """Optimizer state by parameter name and key."""
    return {
        f"{name}/{key}": value.clone() if isinstance(value, torch.Tensor) else value
        for name, parameter in run.adapter.named_parameters()
        for key, value in run.optimizer.state.get(parameter, {}).items()
    }


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_comes_back_bit_for_bit_and_goes_on_as_if_it_had_not_stopped(tmp_path, optimizer):
    run, again = trained(optimizer), Run(optimizer, seed=1)
    run.save(tmp_path)
    again.load(tmp_path)
    assert_same_bits(bits(again.adapter), bits(run.adapter))
    assert_same_bits(optimizer_bits(again), optimizer_bits(run))
    for going in (run, again):
        going.step("c", "a").step("b", "c")
    assert_same_bits(bits(again.adapter), bits(run.adapter))


@pytest.mark.parametrize("policy", ["private", "uniform", "fixed"])
def test_an_adapter_without_trained_routing_goes_on_too(tmp_path, policy):
    options = {"policy": policy, "n_skills": 2, "n_splits": 2}
    if policy == "private":
        options = {"private": True, "n_skills": 1}
    config = AdapterConfig(layout="attention", **options)
    run, again = trained(config=config), Run(config=config, seed=1)
    run.save(tmp_path)
    again.load(tmp_path)
    for going in (run, again):
        going.step("a", "c")
    assert_same_bits(bits(again.adapter), bits(run.adapter))


def test_saving_changes_nothing(tmp_path):
    run, other = trained(), trained()
    run.save(tmp_path)
    assert_same_bits(bits(run.adapter), bits(other.adapter))


def test_the_optimizers_state_of_routing_rows_is_saved():
    """Without it the comparisons above would compare too little."""
    run = trained("adafactor")
    assert {"routing_logits/row", "routing_logits/step"} <= optimizer_bits(run).keys()


def test_a_step_before_the_first_update_can_be_saved(tmp_path):
    run, again = Run(), Run(seed=1)
    run.save(tmp_path, 0)
    again.load(tmp_path, 0)
    assert_same_bits(bits(again.adapter), bits(run.adapter))


def test_progress_comes_back_with_the_step(tmp_path):
    trained().save(tmp_path, 7, plan="abc", samples=112)
    progress = Run().load(tmp_path, 7)
    assert (progress["step"], progress["plan"], progress["samples"]) == (7, "abc", 112)


def test_a_saved_step_is_an_adapter_of_its_own(tmp_path):
    run = trained()
    folder = run.save(tmp_path)
    assert_same_bits(bits(artefact.load(folder)), bits(run.adapter))


def test_a_saved_step_says_where_it_is_from(tmp_path):
    card = artefact.read_card(trained().save(tmp_path, 7))
    assert (card.step, card.backbone, card.origin) == (7, {"name": None}, {"verb": "pretrain"})


# -- folders --------------------------------------------------------------------------------------


def test_a_step_has_a_folder_of_its_number(tmp_path):
    assert trained().save(tmp_path, 500) == tmp_path / "steps" / "000500"


def test_a_saved_step_holds_these_files(tmp_path):
    folder = trained().save(tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "DONE",
        "adapter.json",
        "adapter.safetensors",
        "resume/optimizer.safetensors",
        "resume/progress.json",
    }


def test_nothing_half_written_is_left(tmp_path):
    trained().save(tmp_path)
    assert list(tmp_path.rglob(".*")) == []


def test_the_runs_adapter_is_the_newest(tmp_path):
    run = trained()
    run.save(tmp_path, 2)
    run.step("c", "a").save(tmp_path, 3)
    assert_same_bits(bits(artefact.load(tmp_path)), bits(run.adapter))
    assert artefact.read_card(tmp_path).step == 3


@pytest.mark.parametrize("left", ["adapter.json", "adapter.safetensors"])
def test_an_adapter_left_older_or_torn_is_made_that_of_the_step(tmp_path, left):
    run = trained()
    folder = run.save(tmp_path, 2)
    (tmp_path / "adapter" / left).write_text("{}")
    checkpoint.publish(tmp_path, 2)
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_without_saved_steps_has_nothing_to_resume(tmp_path):
    assert saved_steps.find_resume(tmp_path) is None


def test_a_run_resumes_from_its_newest_step(tmp_path):
    for step in (900, 1000, 2):
        trained().save(tmp_path, step)
    assert saved_steps.find_resume(tmp_path) == 1000


def test_steps_beyond_a_million_are_in_order(tmp_path):
    for step in (999_999, 1_000_000):
        trained().save(tmp_path, step)
    assert saved_steps.complete_steps(tmp_path) == [999_999, 1_000_000]


def test_a_folder_without_done_does_not_exist(tmp_path):
    trained().save(tmp_path, 2)
    (trained().save(tmp_path, 4) / "DONE").unlink()
    assert saved_steps.find_resume(tmp_path) == 2


def test_a_folder_without_done_is_written_anew(tmp_path):
    run = trained()
    folder = run.save(tmp_path, 2)
    (folder / "DONE").unlink()
    (folder / "adapter.json").write_text("{")
    run.save(tmp_path, 2)
    assert_same_bits(bits(artefact.load(folder)), bits(run.adapter))


def test_a_copy_of_a_step_beside_it_is_no_step(tmp_path):
    folder = trained().save(tmp_path, 2)
    shutil.copytree(folder, folder.with_name("000002 (copy)"))
    assert saved_steps.complete_steps(tmp_path) == [2]


def test_the_rest_of_a_broken_save_does_no_harm(tmp_path):
    partial = tmp_path / "steps" / ".000002.tmp"
    (partial / "resume").mkdir(parents=True)
    (partial / "adapter.safetensors").write_bytes(b"half")
    (partial / "resume" / "optimizer.safetensors").write_bytes(b"half")
    run = trained()
    folder = run.save(tmp_path, 2)
    assert not partial.exists()
    assert_same_bits(bits(artefact.load(folder)), bits(run.adapter))


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [8]), (2, [6, 8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])]
)
def test_old_steps_are_removed(tmp_path, keep, kept):
    run = Run()
    for step in (2, 4, 6, 8):
        run.save(tmp_path, step, keep=keep)
    assert saved_steps.complete_steps(tmp_path) == kept
    assert sorted(int(path.name) for path in (tmp_path / "steps").iterdir()) == kept


def test_a_folder_without_done_is_neither_counted_nor_removed_as_an_old_step(tmp_path):
    run = Run()
    for step in (2, 4):
        run.save(tmp_path, step, keep=2)
    (tmp_path / "steps" / "000002" / "DONE").unlink()
    run.save(tmp_path, 6, keep=2)
    assert saved_steps.complete_steps(tmp_path) == [4, 6]
    assert (tmp_path / "steps" / "000002").exists()


# -- what cannot be resumed from ------------------------------------------------------------------


def flip_last_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-10])


def edit(file, **changes):
    values = json.loads(file.read_text())
    values.update(changes)
    file.write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("file", "damage", "kind", "expected"),
    [
        ("resume/optimizer.safetensors", flip_last_byte, RunError, "its hash is not the stored"),
        ("resume/optimizer.safetensors", "remove", RunError, "cannot resume from it"),
        ("resume/progress.json", "remove", RunError, "cannot resume from it"),
        ("resume/progress.json", cut_off, RunError, "cannot resume from it"),
        ("resume/progress.json", b"\xff\xfe", RunError, "cannot resume from it"),
        ("resume/progress.json", b"[]", RunError, "cannot resume from it"),
        ("resume/progress.json", b"{}", RunError, "cannot resume from it"),
        ("resume/progress.json", {"optimizer": {"other": {}}}, RunError, "cannot resume from it"),
        ("adapter.safetensors", flip_last_byte, AdapterError, "its hash is not the one in adapter"),
    ],
)
def test_a_damaged_step_is_refused(tmp_path, file, damage, kind, expected):
    path = trained().save(tmp_path) / file
    if damage == "remove":
        path.unlink()
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    elif isinstance(damage, dict):
        edit(path, **damage)
    else:
        damage(path)
    with pytest.raises(kind) as caught:
        Run().load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "steps") in message
    assert expected in message


def test_a_step_that_is_not_there_is_refused(tmp_path):
    trained().save(tmp_path, 2)
    with pytest.raises(AdapterError, match="000004"):
        Run().load(tmp_path, 4)


@pytest.mark.parametrize("tasks", [("b", "a", "c"), (*TASKS, "d")])
def test_a_step_of_other_tasks_is_refused(tmp_path, tasks):
    trained().save(tmp_path)
    with pytest.raises(RunError, match=r"other tasks than the recipe's; use another run\.folder"):
        Run(tasks=tasks).load(tmp_path)


@pytest.mark.parametrize("change", [{"layout": "light"}, {"policy": "noisy"}], ids=str)
def test_a_step_of_another_method_or_layout_is_refused(tmp_path, change):
    trained().save(tmp_path)
    fields = {"layout": "attention", "rank": 2, "n_skills": 3, "n_splits": 2, **change}
    with pytest.raises(RunError, match="another layout or method than the recipe's"):
        Run(config=AdapterConfig(**fields)).load(tmp_path)


def test_a_refused_step_leaves_the_adapter_as_it_is(tmp_path):
    flip_last_byte(trained().save(tmp_path) / "adapter.safetensors")
    run, untouched = Run(seed=1), Run(seed=1)
    with pytest.raises(AdapterError):
        run.load(tmp_path)
    assert_same_bits(bits(run.adapter), bits(untouched.adapter))


@contextmanager
def without_root() -> Iterator[None]:
    """The block as a user whom permissions bind."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["steps", "steps/000003"])
def test_saved_steps_that_may_not_be_read_are_not_passed_over(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        trained().save(Path(folder), 3)
        mode = (Path(folder) / name).stat().st_mode
        (Path(folder) / name).chmod(0)
        try:
            with without_root(), pytest.raises(RunError) as caught:
                saved_steps.find_resume(Path(folder))
        finally:
            (Path(folder) / name).chmod(mode)
    assert "saved steps cannot be listed: " in str(caught.value)
    assert "no permission; change the permissions" in str(caught.value)
