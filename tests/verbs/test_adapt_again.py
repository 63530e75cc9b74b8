"""The verb `adapt` on a run folder that is there already: finished jobs, stopped jobs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import (
    LORA,
    TASKS,
    contents,
    job_folders,
    make_config,
    make_source,
    onto,
    results,
    times,
    write_rows,
)

from mhr_scale.adapters import artefact
from mhr_scale.config import AdaptConfig, VariantConfig, WavesConfig
from mhr_scale.errors import RunError
from mhr_scale.jobs import runner
from mhr_scale.jobs.adapt_inputs import open_jobs
from mhr_scale.jobs.wave import Wave
from mhr_scale.training import checkpoint, saved_steps
from mhr_scale.verbs import adapt as verb
from mhr_scale.verbs.adapt import adapt

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("again")


@pytest.fixture(scope="module")
def source(base) -> Path:
    return make_source(base / "source")


@pytest.fixture(scope="module")
def config(base, source) -> AdaptConfig:
    variants = {
        "MHR": VariantConfig(adapter=str(source)),
        "MHR-z": VariantConfig(adapter=str(source), kind="routing"),
    }
    return make_config(base / "run", write_rows(base / "rows"), variants)


@pytest.fixture(scope="module")
def run(config) -> Path:
    """A run that nothing has interrupted."""
    return adapt(config)


@pytest.fixture
def again(config, run, tmp_path) -> AdaptConfig:
    """A copy of that run to go on with."""
    shutil.copytree(run, tmp_path / "run")
    return onto(config, tmp_path / "run")


# --- finished jobs


def test_the_same_command_runs_nothing_again(again):
    folder = Path(again.run.folder)
    before, summary = times(folder), (folder / "summary.json").read_text()
    adapt(again)
    assert times(folder) == before
    assert (folder / "summary.json").read_text() == summary
    assert len(json.loads((folder / "provenance.json").read_text())) == 2


def test_a_new_seed_and_a_new_variant_run_their_own_jobs_only(again):
    folder = Path(again.run.folder)
    before = times(folder)
    variants = {**again.variants, "LoRA": LORA}
    adapt(replace(again, shots=replace(again.shots, seeds=(0, 3)), variants=variants))
    after = times(folder)
    assert {name: after[name] for name in before} == before
    new = set(results(folder)) - {(task, "0", v) for task in TASKS for v in again.variants}
    assert new == {
        *((task, "3", variant) for task in TASKS for variant in ("MHR", "MHR-z", "LoRA")),
        *((task, "0", "LoRA") for task in TASKS),
    }
    found = json.loads((folder / "summary.json").read_text())["variants"]
    assert {name: one["seeds"] for name, one in found.items()} == {
        name: [0, 3] for name in variants
    }


def test_the_table_is_of_the_jobs_of_the_recipe(again):
    adapt(replace(again, variants={"MHR": again.variants["MHR"]}))
    found = json.loads((Path(again.run.folder) / "summary.json").read_text())
    assert set(found["variants"]) == {"MHR"}


def test_where_and_how_fast_jobs_run_may_change(again):
    folder = Path(again.run.folder)
    before = times(folder)
    run = replace(again.run, log_every=7, timeout_seconds=60.0)
    adapt(replace(again, run=run, waves=WavesConfig(size=1, save_every=5)))
    assert times(folder) == before


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("protocol", {"steps": 8}, "protocol.steps was 6, is 8"),
        ("protocol", {"loss": "language_model"}, "protocol.loss was t_few, is language_model"),
        ("optim", {"lr": 0.5}, r"optim.lr was 0.02, is 0.5"),
        ("shots", {"count": 6}, "shots.count was 8, is 6"),
        ("selection", {"patience": 3}, "selection.patience was null, is 3"),
        ("scoring", {"length_norm": 0.0}, "scoring.length_norm was 1.0, is 0.0"),
        ("tasks", {"seed": 7}, "tasks.seed was 42, is 7"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(again, part, changes, words):
    folder = Path(again.run.folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = replace(again, **{part: replace(getattr(again, part), **changes)})
    with pytest.raises(RunError, match=rf"holds jobs of other settings \({words}\).*another run"):
        adapt(changed)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def with_routing_rate(config: AdaptConfig, rate: float) -> AdaptConfig:
    variants = {**config.variants, "MHR-z": replace(config.variants["MHR-z"], routing_lr=rate)}
    return replace(config, variants=variants)


def test_a_variant_that_became_another_one_is_refused(again):
    words = r"holds jobs of other settings \(variants\.MHR-z\.routing_lr was null, is 0\.5\)"
    with pytest.raises(RunError, match=words):
        adapt(with_routing_rate(again, 0.5))


def test_a_variant_that_was_left_out_cannot_come_back_as_another_one(again):
    adapt(replace(again, variants={"MHR": again.variants["MHR"]}))
    with pytest.raises(RunError, match=r"variants\.MHR-z\.routing_lr was null, is 0\.5"):
        adapt(with_routing_rate(again, 0.5))
    before = times(Path(again.run.folder))
    adapt(again)
    assert times(Path(again.run.folder)) == before


@pytest.mark.parametrize(
    ("damage", "fault"), [({"score": None}, "score is None"), ({"source_numbers": [1]}, "numbers")]
)
def test_a_damaged_result_is_named(again, damage, fault):
    file = next(iter(job_folders(Path(again.run.folder)).values())) / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    words = rf"result\.json: not a result .*{fault}.*delete it and run again"
    with pytest.raises(RunError, match=words):
        adapt(again)


# --- interrupted runs


class Stopped(BaseException):
    """What stops a run, as Ctrl-C does."""


def stop_at(patch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Stop the run in the so-many-th call of a function."""
    function, calls = getattr(owner, name), [0]

    def counted(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            raise Stopped
        return function(*arguments, **options)

    patch.setattr(owner, name, counted)


#: In the first wave and in the second, between saves and evaluations, when all but done.
STOPS = [
    (0, Wave, "train_step", 4),
    (4, Wave, "train_step", 9),
    (2, checkpoint, "save", 4),
    (2, artefact, "save", 9),
    (0, runner, "write_result", 2),
]


@pytest.mark.parametrize(
    ("save_every", "owner", "name", "call"),
    STOPS,
    ids=[f"{name}-{call}-saved-{every}" for every, _, name, call in STOPS],
)
def test_an_interrupted_run_goes_on_to_the_very_same_files(
    config, run, tmp_path, save_every, owner, name, call
):
    waves = WavesConfig(size=4, save_every=save_every)
    stopped = onto(config, tmp_path / "run", waves=waves)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, owner, name, call)
        with pytest.raises(Stopped):
            adapt(stopped)
    assert set(results(tmp_path / "run")) != set(results(run))
    adapt(stopped)
    found, expected = contents(tmp_path / "run"), contents(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_jobs_go_on_from_their_newest_saved_step(config, tmp_path):
    stopped = onto(config, tmp_path / "run", waves=WavesConfig(size=4, save_every=2))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Wave, "train_step", 6)
        with pytest.raises(Stopped):
            adapt(stopped)
    saved = {saved_steps.find_resume(f) for f in job_folders(tmp_path / "run").values()}
    assert saved == {4}
    with pytest.MonkeyPatch.context() as patch:
        steps = []
        train_step = Wave.train_step
        patch.setattr(
            Wave,
            "train_step",
            lambda wave, *a, **o: steps.append(wave.step) or train_step(wave, *a, **o),
        )
        adapt(stopped)
    assert sorted(steps) == [0, 1, 2, 3, 4, 4, 5, 5]


# --- the memory of a rank


def test_a_run_keeps_the_rows_of_the_jobs_that_are_left_alone(again, monkeypatch):
    """As a rank keeps those of its own: the other jobs are finished, or run elsewhere."""
    job = f"{TASKS[0]}/0/MHR"
    shutil.rmtree(Path(again.run.folder) / "jobs" / job)
    opened = []

    def spy(config):
        opened.append(open_jobs(config))
        return opened[0]

    monkeypatch.setattr(verb, "open_jobs", spy)
    adapt(again)
    assert list(opened[0].data) == [(TASKS[0], 0)]
    assert (Path(again.run.folder) / "jobs" / job / "result.json").is_file()
    summary = json.loads((Path(again.run.folder) / "summary.json").read_text())
    assert summary["selected_on"].keys() == set(TASKS)
