"""Jobs in a wave against the same jobs one after the other."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import (
    ADAFACTOR,
    ADAMW,
    CPU,
    MHR,
    Bench,
    Case,
    assert_same,
    make_case,
    make_source,
    tensors_of,
)

from mhr_scale.config import AdapterConfig, AdaptRunConfig, VariantConfig
from mhr_scale.jobs.adapt_inputs import AdaptInputs
from mhr_scale.jobs.job import JobProgress
from mhr_scale.jobs.open_waves import open_wave
from mhr_scale.jobs.scheduling import PlannedWave
from mhr_scale.jobs.wave import Wave
from mhr_scale.tasks.task import Intake

IA3 = AdapterConfig(kind="ia3", layout="light", n_skills=1)
SOURCE = VariantConfig(adapter="source")
ROUTING = VariantConfig(adapter="source", kind="routing")
#: Variants with the adapter they start from.
KINDS = {
    "MHR": (SOURCE, MHR),
    "routing": (ROUTING, MHR),
    "average": (VariantConfig(adapter="source", kind="average"), MHR),
    "inventory under uniform routing": (
        VariantConfig(adapter="source", kind="average", trainable="inventory"),
        MHR,
    ),
    "noisy MHR": (SOURCE, replace(MHR, policy="noisy")),
    "noisy routing": (ROUTING, replace(MHR, policy="noisy")),
    "random": (SOURCE, replace(MHR, policy="random")),
    "Poly by block": (SOURCE, AdapterConfig(n_skills=16, rank=2, granularity="block")),
    # a product of one column, or sigmoids in odd numbers, would round by who is beside a job
    "rank 1, 3 skills": (SOURCE, replace(MHR, rank=1, n_skills=3)),
    "rank 1, 5 skills": (SOURCE, replace(MHR, rank=1, n_skills=5)),
    "LoRA": (VariantConfig(fresh=AdapterConfig(n_skills=1, rank=4), lr=1e-2), None),
    "(IA)3": (VariantConfig(fresh=IA3), None),
    "MHR-(IA)3": (SOURCE, replace(IA3, n_skills=4, n_splits=4)),
}
OPTIMIZERS = {"adamw": ADAMW, "adafactor": ADAFACTOR}
LOSSES = {
    "language_model": {},
    "smoothed, by example": {"label_smoothing": 0.1, "normalise": "examples"},
    "t_few": {"loss": "t_few", "mc_weight": 0.5, "ul_weight": 2.0},
}
#: Every kind with both optimizers; the losses in turn.
COMBINATIONS = [
    (kind, optim, list(LOSSES)[(number + 2 * place) % 3])
    for number, kind in enumerate(KINDS)
    for place, optim in enumerate(OPTIMIZERS)
]


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    return {layout: Bench(layout) for layout in ("full", "light")}


def make(kind: str, optim: str = "adamw", loss: str = "language_model", **options) -> Case:
    variant, config = KINDS[kind]
    source = None if config is None else make_source(config)
    return make_case(variant, source, optim=OPTIMIZERS[optim], **LOSSES[loss], **options)


def bench_of(benches: dict[str, Bench], kind: str) -> Bench:
    return benches["light" if "(IA)3" in kind else "full"]


def assert_as_alone(bench: Bench, case: Case) -> None:
    """Every job of the case leaves the same numbers beside the others and alone."""
    together = bench.train(case.open())
    for number, member in enumerate(case.members):
        alone = bench.train(case.open([number]))
        assert len(alone.values[member.job]) == member.steps
        assert together.values[member.job] == alone.values[member.job]
        assert_same(together.tensors[member.job], alone.tensors[member.job])


# --- beside others as alone


@pytest.mark.parametrize(("kind", "optim", "loss"), COMBINATIONS)
def test_jobs_of_a_wave_are_equal_to_jobs_alone_bit_for_bit(benches, kind, optim, loss):
    """Two of them leave before the others."""
    assert_as_alone(bench_of(benches, kind), make(kind, optim, loss, steps=(9, 4, 7, 9)))


def test_jobs_move_and_no_two_of_them_alike(benches):
    case = make("MHR")
    before = {m.job: tensors_of(case.open().take(n)) for n, m in enumerate(case.members)}
    found = benches["full"].train(case.open()).tensors
    first, second, third = (found[member.job] for member in case.members)
    assert all(not torch.equal(first[name], before[case.members[0].job][name]) for name in first)
    for name in first:
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], third[name])


def test_jobs_learn(benches):
    case = make("average", steps=(40, 40))
    for values in benches["full"].train(case.open()).values.values():
        losses = [value["loss"] for value in values]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_routing_jobs_leave_the_inventory_alone(benches):
    case = make("routing")
    before = {n: t for n, t in tensors_of(case.source).items() if "routing" not in n}
    for tensors in benches["full"].train(case.open()).tensors.values():
        assert_same({name: tensors[name] for name in before}, before)


# --- rates


def test_every_job_has_the_schedule_of_its_own_length(benches):
    case = make("average", steps=(10, 5), warmup_fraction=0.4)
    values = benches["full"].train(case.open()).values
    rates = [[value["lr"] / ADAMW.lr for value in values[m.job]] for m in case.members]
    assert rates[0] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates[1] == pytest.approx([0, 0.5, 1, 2 / 3, 1 / 3])


def test_a_variant_s_own_rates_stand_in_for_the_recipe_s(benches):
    variant = VariantConfig(adapter="source", lr=0.0, routing_lr=0.5)
    case = make_case(variant, make_source(), warmup_fraction=0.0)
    before = tensors_of(case.open().take(0))
    trained = benches["full"].train(case.open(), until=1)
    after = trained.tensors[case.members[0].job]
    assert trained.values[case.members[0].job][0]["lr"] == 0.0
    for name, tensor in before.items():
        moved = (after[name] - tensor).abs().max().item()
        assert moved == (pytest.approx(0.5, rel=1e-3) if "routing" in name else 0.0)


@pytest.mark.parametrize(
    ("kind", "logged"), [("routing", {"lr": 0.5}), ("full", {"lr": 0.25, "lr_routing": 0.5})]
)
def test_the_rate_in_the_log_is_the_one_of_what_trains(benches, kind, logged):
    variant = VariantConfig(adapter="source", kind=kind, lr=0.25, routing_lr=0.5)
    case = make_case(variant, make_source(), warmup_fraction=0.0)
    values = benches["full"].train(case.open(), until=1).values[case.members[0].job][0]
    assert {name: value for name, value in values.items() if name.startswith("lr")} == logged


# --- jobs that diverge


def spoil(number: int):
    """Put a NaN into a job's tensors before the fifth step."""

    def act(wave: Wave) -> None:
        if wave.step == 4:
            with torch.no_grad():
                if wave.variant.kind == "routing":
                    wave.adapter.routing_logits[number].view(-1)[3] = math.nan
                else:
                    next(iter(wave.adapter.inventory.parameters()))[0, number].view(-1)[3] = (
                        math.nan
                    )

    return act


@pytest.mark.parametrize(
    ("kind", "optim", "loss"),
    [
        ("MHR", "adafactor", "language_model"),
        ("routing", "adamw", "t_few"),
        ("average", "adafactor", "language_model"),
        ("noisy MHR", "adamw", "t_few"),
        ("(IA)3", "adamw", "t_few"),
    ],
)
def test_a_job_that_is_no_number_is_given_up_and_the_others_do_not_notice(
    benches, kind, optim, loss
):
    bench, case = bench_of(benches, kind), make(kind, optim, loss)
    clean = bench.train(case.open())
    spoilt = bench.train(case.open(), before=spoil(1))
    first, second, third = (member.job for member in case.members)
    assert spoilt.lost == [second]
    assert spoilt.values[second] == clean.values[second][:4]
    for job in (first, third):
        assert spoilt.values[job] == clean.values[job]
        assert_same(spoilt.tensors[job], clean.tensors[job])


def test_an_infinite_gradient_alone_gives_a_job_up(benches, monkeypatch):
    from mhr_scale.jobs import job_optim

    case = make("average")
    clip = job_optim.clip_jobs

    def overflow(adapter, clip_norm):
        if len(adapter.task_names) == 3:
            next(iter(adapter.inventory.parameters())).grad[0, 2] = math.inf
        return clip(adapter, clip_norm)

    monkeypatch.setattr(job_optim, "clip_jobs", overflow)
    assert benches["full"].train(case.open()).lost == [case.members[2].job]


def test_a_wave_whose_jobs_are_all_lost_is_empty(benches):
    def act(wave: Wave) -> None:
        torch.nn.init.constant_(next(iter(wave.adapter.inventory.parameters())), math.nan)

    case = make("MHR")
    wave = case.open()
    assert len(benches["full"].train(wave, before=act).lost) == 3
    assert (wave.members, wave.step) == ([], 1)


# --- saved and opened again


def reopen(case: Case, numbers: list[int], run: Path, step: int) -> Wave:
    """Some of the jobs as the verb opens them where they stand at a saved step."""
    nothing: Any = None
    inputs = AdaptInputs(
        config=replace(case.config, run=AdaptRunConfig(folder=str(run))),
        sources={} if case.source is None else {"source": case.source},
        backbone=nothing,
        sites={},
        data={(member.job.task, member.job.seed): member.data for member in case.members},
        intake=Intake(),
        jobs=[member.job for member in case.members],
    )
    estimates = (inputs.estimate(case.members[n].job, step=step) for n in numbers)
    return open_wave(inputs, PlannedWave(tuple(estimates)), {}, device=CPU)


@pytest.mark.parametrize(
    ("kind", "optim"),
    [
        *((kind, optim) for kind in ("MHR", "routing") for optim in OPTIMIZERS),
        ("noisy MHR", "adamw"),
        ("(IA)3", "adafactor"),
    ],
)
def test_a_saved_wave_goes_on_bit_for_bit(benches, kind, optim, tmp_path):
    bench, case = bench_of(benches, kind), make(kind, optim)
    whole = bench.train(case.open())
    wave = case.open()
    bench.train(wave, until=7)
    for number in range(3):
        wave.copy(number, tmp_path, backbone={})()
    for numbers in ([2, 0], [1]):  # in any company
        rest = bench.train(reopen(case, numbers, tmp_path, 7))
        for number in numbers:
            job = case.members[number].job
            assert rest.values[job] == whole.values[job][7:]
            assert_same(rest.tensors[job], whole.tensors[job])


def test_saving_a_job_changes_nothing(benches, tmp_path):
    case = make("MHR")
    saved = benches["full"].train(
        case.open(), before=lambda wave: wave.copy(1, tmp_path, backbone={})()
    )
    whole = benches["full"].train(case.open())
    for member in case.members:
        assert_same(saved.tensors[member.job], whole.tensors[member.job])


def test_a_saved_job_remembers_its_evaluations(benches, tmp_path):
    case = make("MHR")
    wave = case.open()
    benches["full"].train(wave, until=2)
    for step, score in ((0, 20.0), (1, 60.0), (2, 60.0)):
        wave.members[1].progress.take(step, score)
    wave.copy(1, tmp_path, backbone={})()
    (member,) = reopen(case, [1], tmp_path, 2).members
    assert member.progress == wave.members[1].progress
    assert (member.progress.best_step, member.progress.worse) == (1, 1)


def test_only_the_newest_saved_step_of_a_job_stays(benches, tmp_path):
    case = make("MHR", steps=(3, 3))
    benches["full"].train(case.open(), before=lambda wave: wave.copy(0, tmp_path, backbone={})())
    folder = case.members[0].job.folder(tmp_path)
    assert [path.name for path in (folder / "steps").iterdir()] == ["000002"]
    assert not (folder / "adapter").exists()


def test_of_equal_scores_the_first_one_is_the_best():
    progress = JobProgress()
    assert [progress.take(n, score) for n, score in enumerate([1.0, 3.0, 3.0, 2.0, 4.0])] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert (progress.best_step, progress.best_score, progress.worse) == (4, 4.0, 0)
    assert JobProgress.read({"standing": asdict(progress)}, place=Path()) == progress
