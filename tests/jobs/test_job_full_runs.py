"""Jobs of kind backbone through the verb: beside others, what they leave, going on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_jobs import (
    FULL,
    PLAIN,
    RANKED,
    TIED,
    TOY,
    Bench,
    differing,
    folder_of,
    fresh_model,
    left_by,
    place_backbone,
    result_of,
)
from safetensors.torch import load_file

from mhr_scale.adapters import AdapterConfig, artefact
from mhr_scale.config import AdaptConfig, BackboneConfig, SelectionConfig, ShotsConfig, WavesConfig
from mhr_scale.errors import DivergenceError
from mhr_scale.jobs.adapt_inputs import open_jobs
from mhr_scale.jobs.full import WEIGHTS, FullWave
from mhr_scale.passes import scoring
from mhr_scale.verbs.adapt import adapt


def test_two_jobs_one_after_the_other_equal_each_alone(
    recipe: Callable[..., AdaptConfig],
) -> None:
    together = recipe(("one", "two"), "together")
    adapt(together)
    for task in ("one", "two"):
        alone = recipe((task,), f"alone-{task}")
        adapt(alone)
        assert not differing(left_by(together, task), left_by(alone, task))
        assert result_of(together, task) == result_of(alone, task)


@pytest.mark.parametrize("rate", [1e-3, 1e30], ids=["fine", "diverging"])
def test_ordinary_variants_do_not_notice_it(
    recipe: Callable[..., AdaptConfig], rate: float
) -> None:
    tasks, waves = ("one", "two"), WavesConfig(size=1)
    beside = recipe(
        tasks, "beside", waves=waves, variants={"a": replace(FULL, backbone_lr=rate), "b": PLAIN}
    )
    if rate == 1e30:
        with pytest.raises(DivergenceError, match="2 job"):
            adapt(beside)
    else:
        adapt(beside)
    alone = recipe(tasks, "alone", waves=waves, variants={"b": PLAIN})
    adapt(alone)
    for task in tasks:
        assert not differing(left_by(beside, task, "b"), left_by(alone, task, "b"))
        assert result_of(beside, task, "b") == result_of(alone, task, "b")


def test_ordinary_variants_share_waves_beside_it(recipe: Callable[..., AdaptConfig]) -> None:
    config = recipe(("one", "two"), variants={"a": FULL, "b": PLAIN})
    adapt(config)
    results = [result_of(config, task, name) for task in ("one", "two") for name in "ab"]
    assert [result["kind"] for result in results] == ["backbone", "full"] * 2


def test_the_result_counts_adapter_and_backbone(recipe: Callable[..., AdaptConfig]) -> None:
    config = recipe(variants={"f": FULL, "lora": PLAIN})
    adapt(config)
    adapter = result_of(config, variant="lora")["trained_numbers"]
    own = sum(parameter.numel() for parameter in fresh_model(TOY).parameters())
    assert result_of(config)["trained_numbers"] == adapter + own


def test_nothing_but_the_best_weights_and_their_adapter_stays(
    recipe: Callable[..., AdaptConfig],
) -> None:
    selection = SelectionConfig(on="test", every_epochs=1)
    config = recipe(selection=selection, waves=WavesConfig(save_every=2))
    adapt(config)
    folder = folder_of(config)
    expected = {"adapter", WEIGHTS, "metrics.jsonl", "scores.jsonl", "result.json"}
    assert {path.name for path in folder.iterdir()} == expected
    assert artefact.read_card(folder).origin["backbone"] == WEIGHTS


def test_better_weights_take_the_place_of_those_before(
    recipe: Callable[..., AdaptConfig], tmp_path: Path
) -> None:
    bench = Bench(recipe())
    wave = bench.open()
    with wave.thawed(bench.model):
        for name in ("000000", "000003"):
            wave.keep(0, tmp_path / "best" / name, backbone={})
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["000003"]


def selections() -> list[Any]:
    return [
        pytest.param(SelectionConfig(on=on, every_epochs=1), id=on)
        for on in ("test", "shots", "last")
    ]


@pytest.mark.parametrize("selection", selections())
@pytest.mark.parametrize("own", [TOY, TIED], ids=["untied", "tied"])
def test_a_fresh_model_with_the_weights_and_the_adapter_gives_the_scores(
    recipe: Callable[..., AdaptConfig], own: BackboneConfig, selection: SelectionConfig
) -> None:
    shots = ShotsConfig(seeds=(0,), set_aside=4)
    config = recipe(backbone=own, selection=selection, shots=shots)
    adapt(config)
    folder, placed = folder_of(config), place_backbone(own)
    parameters, tensors = dict(placed.model.named_parameters()), load_file(folder / WEIGHTS)
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    adapter = artefact.load(folder, model=placed.model)
    (data,) = open_jobs(config).data.values()
    batch = [replace(row, task=0) for row in data.test.rows]
    scores = scoring.rank_choices(placed, adapter, batch, length_norm=1.0)
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, scores, strict=True):
        assert line["choice_scores"] == pytest.approx(expected, abs=1e-5)
    right = sum(
        values.index(min(values)) == question.example.label
        for values, question in zip(scores, data.test.questions, strict=True)
    )
    assert result_of(config)["score"] == pytest.approx(100.0 * right / len(batch))


def test_the_scores_are_those_of_the_best_step(recipe: Callable[..., AdaptConfig]) -> None:
    """A job that stops where another one was best leaves what the other one kept."""
    constant = replace(RANKED, decay="constant", warmup_fraction=0.0, steps=9)
    selection = SelectionConfig(on="shots", every_epochs=1)
    shots = ShotsConfig(seeds=(0,), set_aside=4)
    changes = {"selection": selection, "shots": shots, "protocol": constant}
    wild = {"f": replace(FULL, backbone_lr=2e-2)}
    config = recipe(run="long", variants=wild, **changes)
    adapt(config)
    best = result_of(config)["best_step"]
    assert 0 < best < 9
    changes["selection"] = SelectionConfig(on="last")
    changes["protocol"] = replace(constant, steps=best)
    short = recipe(run="short", variants=wild, **changes)
    adapt(short)
    assert not differing(left_by(config), left_by(short))
    assert result_of(config)["score"] == result_of(short)["score"]


def test_an_interrupted_job_starts_again(
    recipe: Callable[..., AdaptConfig], caplog: pytest.LogCaptureFixture
) -> None:
    selection = SelectionConfig(on="test", every_epochs=1)
    config = recipe(selection=selection)
    adapt(config)
    folder, before, expected = folder_of(config), left_by(config), result_of(config)
    (folder / "result.json").unlink()
    (folder / "best").mkdir()
    (folder / "adapter").rename(folder / "best" / "000003")
    with caplog.at_level("INFO", logger="mhr_scale"):
        adapt(config)
    assert "starts again" in caplog.text
    assert not differing(left_by(config), before)
    assert result_of(config) == expected
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert sorted(map(json.loads, lines), key=str) == sorted(map(json.loads, set(lines)), key=str)


def test_a_finished_job_is_left_alone(recipe: Callable[..., AdaptConfig]) -> None:
    config = recipe()
    adapt(config)
    written = (folder_of(config) / WEIGHTS).stat().st_mtime_ns
    adapt(config)
    assert (folder_of(config) / WEIGHTS).stat().st_mtime_ns == written


def test_it_starts_from_a_trained_inventory(recipe: Callable[..., AdaptConfig]) -> None:
    first = recipe(run="first", variants={"lora": replace(PLAIN, fresh=AdapterConfig(rank=1))})
    adapt(first)
    source = str(folder_of(first, variant="lora") / "adapter")
    config = recipe(backbone=None, variants={"f": replace(FULL, fresh=None, adapter=source)})
    bench = Bench(config)
    wave = bench.open()
    assert isinstance(wave, FullWave)
    stored = load_file(Path(source) / artefact.TENSORS)
    tensors = artefact.named_tensors(wave.take(0))
    different = differing(tensors, stored)
    assert different
    assert all(name.endswith("routing_logits") for name in different)
