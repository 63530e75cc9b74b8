"""The study's units: valid recipes, in order, rates chosen on training tasks alone."""

import dataclasses
import json
from pathlib import Path

import pytest
from processes import ROOT

from mhr_scale.errors import ConfigError, DataError
from mhr_scale.recipe.reading import load
from mhr_scale.tasks import toy
from reproduction.rates import Trial, choose
from reproduction.study import parse
from reproduction.study_suites import SEARCH_SEED, SUITES, TOY, StudySuite, quick
from reproduction.study_tasks import open_data
from reproduction.units import VERBS, read_record, write_record
from reproduction.units_to_run import Rate, Rates, Unit, candidates, search_units, study_units

RECIPES = ROOT / "launch" / "recipes" / "reproduce"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A folder like the real data's, with twenty task names and no task."""
    lists = tmp_path / "shared" / "data" / "superni_sample" / "splits" / "default"
    lists.mkdir(parents=True)
    (lists / "train_tasks.txt").write_text("\n".join(f"task{n:02d}" for n in range(20)))
    (lists / "test_tasks.txt").write_text("test1\ntest0\ntest2\n")
    (lists.parents[1] / "tasks").mkdir()
    backbone = tmp_path / "shared" / "backbones" / "t5_mini_text"
    backbone.mkdir(parents=True)
    (backbone / "config.json").write_text("{}")
    return tmp_path / "shared"


def any_rates(suite: StudySuite) -> dict[str, Rates]:
    rate = Rate(lr=0.002, routing_lr=0.2)
    rates = Rates(
        pretrain=dict.fromkeys(suite.regimes, 0.01),
        adapt={"full": rate, "routing": rate, "average": rate, "soup": rate},
    )
    return {method.name: rates for method in suite.searched}


def all_units(suite: StudySuite, root: Path, shared: Path) -> list[Unit]:
    data = open_data(suite, root=root, shared=shared)
    return [
        *search_units(suite, data, root),
        *study_units(suite, data, root, any_rates(suite)),
    ]


@pytest.mark.parametrize("suite", [*SUITES.values(), *map(quick, SUITES.values())])
def test_every_unit_is_a_valid_recipe_and_comes_after_what_it_needs(
    suite: StudySuite, tmp_path: Path, sample: Path
):
    seen: set[str] = set()
    units = all_units(suite, tmp_path, sample)
    for unit in units:
        assert set(unit.needs) <= seen
        seen.add(unit.name)
    assert len(seen) == len(units)
    for unit in {(u.verb, u.name.split("/")[-1]): u for u in units}.values():
        schema, _ = VERBS[unit.verb]
        load(schema, RECIPES / unit.recipe, [*unit.settings, f"run.folder={tmp_path}"])


def test_toy_rates_are_chosen_on_tasks_that_no_seed_holds_out(tmp_path: Path):
    data = open_data(TOY, root=tmp_path, shared=tmp_path)
    fit, searched = (
        set(json.loads(data.search[verb][1].removeprefix("tasks.tasks=")))
        for verb in ("pretrain", "adapt")
    )
    held_out = {name for seed in TOY.seeds for name in toy.split(seed)[0]}
    assert SEARCH_SEED not in TOY.seeds
    assert not held_out & (fit | searched)
    assert not fit & searched
    assert searched == set(data.searched)
    assert (len(fit), len(searched)) == (50, TOY.n_search)


def test_superni_rates_are_chosen_on_training_tasks_alone(tmp_path: Path, sample: Path):
    suite = SUITES["superni"]
    data = open_data(suite, root=tmp_path, shared=sample)
    lists = tmp_path / "superni" / "search_tasks" / "splits" / "default"
    fit, searched = (
        (lists / f"{fold}_tasks.txt").read_text().split() for fold in ("train", "test")
    )
    assert sorted(fit + searched) == [f"task{n:02d}" for n in range(20)]
    assert len(searched) == suite.n_search
    assert f"tasks.folder={lists.parents[1]}" in data.search["adapt"]
    assert (lists.parents[1] / "tasks").resolve() == sample / "data" / "superni_sample" / "tasks"
    open_data(suite, root=tmp_path, shared=sample)  # a second start finds them


def test_missing_real_data_are_one_line_that_says_how_to_name_them(tmp_path: Path):
    with pytest.raises(DataError, match="--shared or MHR_SHARED"):
        open_data(SUITES["superni"], root=tmp_path, shared=tmp_path)


def test_methods_of_one_seed_have_split_shots_and_order_in_common(tmp_path: Path):
    units = all_units(TOY, tmp_path, tmp_path)
    for verb, names in {
        "pretrain": ("tasks.seed", "run.seed"),
        "adapt": ("tasks.seed", "shots.seeds"),
    }.items():
        for seed in TOY.seeds:
            found = {
                tuple(setting for setting in unit.settings if setting.startswith(names))
                for unit in units
                if unit.name.startswith(f"toy/seed{seed}/{verb}/")
            }
            assert len(found) == 1
            assert all(str(seed) in setting for setting in found.pop())


def test_the_study_takes_the_rates_of_the_family(tmp_path: Path):
    units = {unit.name: unit for unit in all_units(TOY, tmp_path, tmp_path)}
    assert "optim.lr=0.01" in units["toy/seed1/pretrain/none/MHR-16"].settings
    adapt = units["toy/seed1/adapt/none/MHR-16"].settings
    variants = json.loads(adapt[0].removeprefix("variants="))
    assert [(one["lr"], one["routing_lr"]) for one in variants.values()] == [(0.002, 0.2)]


def test_methods_without_rates_are_left_out(tmp_path: Path):
    data = open_data(TOY, root=tmp_path, shared=tmp_path)
    rates = {"LoRA": any_rates(TOY)["LoRA"]}
    units = study_units(TOY, data, tmp_path, rates)
    assert {unit.name.split("/")[4] for unit in units} == {"LoRA", "LoRA-code"}


def test_z_tuning_tries_routing_rates_and_the_average_tries_none():
    poly, lora = TOY.method("Poly"), TOY.method("LoRA")
    n_lr, n_routing = len(TOY.grid.adapt), len(TOY.grid.routing)
    assert len(candidates(poly, "routing", TOY.grid)) == n_routing
    assert len(candidates(poly, "average", TOY.grid)) == n_lr
    assert len(candidates(poly, "full", TOY.grid)) == n_lr * n_routing
    assert len(candidates(lora, "full", TOY.grid)) == n_lr


def trial(way: str, pretrain: float, score: float | None, *, lr: float = 0.002) -> Trial:
    regime = "full" if way == "zero-shot" else "none"
    return Trial(
        family="Poly",
        regime=regime,
        way=way,
        pretrain_lr=pretrain,
        lr=lr,
        routing_lr=0.05,
        score=score,
    )


def test_the_pretraining_rate_is_best_over_the_mean_of_all_ways():
    low, middle, high = TOY.grid.pretrain
    trials = [
        trial("full", low, 50.0),
        trial("routing", low, 40.0),
        trial("average", low, 30.0),
        trial("full", middle, 40.0),
        trial("full", middle, 48.0, lr=0.015),
        trial("routing", middle, 48.0),
        trial("average", middle, 28.0),
        trial("full", high, 99.0),
        trial("routing", high, None),
        trial("average", high, 99.0),
        trial("zero-shot", low, 10.0),
        trial("zero-shot", high, 20.0),
    ]
    poly = choose(TOY, trials)["Poly"]
    assert poly.pretrain == {"none": middle, "full": high}
    assert poly.adapt["full"].lr == 0.015


def test_of_equal_scores_the_lower_rate_counts():
    low, middle, _ = TOY.grid.pretrain
    trials = [trial(way, lr, 5.0) for way in ("full", "routing", "average") for lr in (middle, low)]
    trials += [trial("full", low, 5.0, lr=0.015)]
    poly = choose(TOY, trials)["Poly"]
    assert poly.pretrain["none"] == low
    assert poly.adapt["full"].lr == 0.002


def test_a_family_whose_every_rate_diverged_has_none():
    trials = [trial("full", lr, None) for lr in TOY.grid.pretrain]
    assert "Poly" not in choose(TOY, trials)


def test_a_record_of_other_settings_is_refused_and_one_without_its_run_counts_as_none(
    tmp_path: Path,
):
    unit = all_units(TOY, tmp_path, tmp_path)[0]
    assert read_record(tmp_path, unit) is None
    write_record(tmp_path, unit, "done", begun=0.0)
    assert read_record(tmp_path, unit) is None
    (tmp_path / unit.name).mkdir(parents=True)
    record = read_record(tmp_path, unit)
    assert record is not None
    assert record.outcome == "done"
    other = dataclasses.replace(unit, settings=(*unit.settings, "schedule.steps=7"))
    with pytest.raises(ValueError, match=r"other settings \(schedule.steps=7\)"):
        read_record(tmp_path, other)


def test_the_command_line_is_read_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MHR_SHARED", str(tmp_path))
    options = parse(["toy", "--workers", "3", "--quick"], launch=ROOT / "launch")
    assert (options.suites, options.workers, options.is_quick) == (("toy",), 3, True)
    assert (options.shared, options.folder) == (tmp_path, Path("runs/reproduce_quick"))
    assert parse([], launch=ROOT / "launch").suites == ("toy", "superni")
    for words, match in (
        (["t0"], "invalid choice: 't0'"),
        (["--workers", "0"], "--workers: 0 is not at least 1"),
        (["--seeds", "1"], "--seeds: 1 is not at least 2"),
        (["--fast"], "unrecognized arguments: --fast"),
    ):
        with pytest.raises(ConfigError, match=match):
            parse(words, launch=ROOT / "launch")
