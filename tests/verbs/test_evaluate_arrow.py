"""`evaluate` under Arrow: a run with private LoRAs, and folders of LoRAs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import make_source

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.collapse import average, collapse
from mhr_scale.adapters.peft_folders import write_peft_ia3, write_peft_lora
from mhr_scale.analysis.clusters import members
from mhr_scale.config import (
    ArrowConfig,
    EvaluateConfig,
    ExportConfig,
    PlainRunConfig,
    ScoringConfig,
    ToyTasks,
)
from mhr_scale.config.export import ClustersConfig
from mhr_scale.errors import AdapterError, ConfigError
from mhr_scale.scores import summary
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.export import export

SETTINGS = ("tasks.validation_examples=5", "tasks.instruction=full", "schedule.steps=8")
LORAS = "adapter={layout: attention, rank: 2, n_skills: 1, private: true}"
TASKS = ToyTasks(suite="toy", fold="held_out", train_examples=10, instruction="full")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("private") / "toy", *SETTINGS, LORAS)


def scores(adapter: Path, folder: Path, **changes: object) -> dict[str, list[float]]:
    config = EvaluateConfig(
        adapter=str(adapter),
        routing="arrow",
        arrow=ArrowConfig(top_k=2),
        tasks=TASKS,
        scoring=ScoringConfig(metric="accuracy", examples=4),
        run=PlainRunConfig(folder=str(folder)),
    )
    evaluate(replace(config, **changes))
    lines = summary.read_scores(folder / "scores.jsonl")
    return {line["id"]: line["choice_scores"] for line in lines}


def write_library(private: Path, folder: Path) -> Path:
    stored = artefact.load(private)
    for task in stored.task_names:
        write_peft_lora(collapse(stored, task), folder / task, base_model="builtin:toy")
    return folder


def single(private: Path) -> Adapter:
    return average(artefact.load(private))


def test_a_folder_of_peft_loras_scores_as_the_run_it_came_from(
    private: Path, tmp_path: Path
) -> None:
    library = write_library(private, tmp_path / "library")
    found = scores(library, tmp_path / "found", backbone_dtype="float32")
    expected = scores(private, tmp_path / "expected")
    mean = scores(private, tmp_path / "mean", routing="average")
    assert found.keys() == expected.keys()
    for identity, wanted in expected.items():
        assert found[identity] == pytest.approx(wanted, rel=1e-5)
    assert any(found[one] != pytest.approx(mean[one], rel=1e-5) for one in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layout", "odd is made for other linears"),
        ("kind", "odd is .*IA.*3, and a library is of single LoRAs"),
        ("private", "odd is private, and a library is of single LoRAs"),
        ("backbone", "LoRAs of different backbones: .*odd of elsewhere; keep those"),
    ],
)
def test_what_is_no_lora_of_the_library_is_refused(
    private: Path, tmp_path: Path, change: str, message: str
) -> None:
    library, stored = write_library(private, tmp_path / "library"), single(private)
    odd = library / "odd"
    if change == "private":
        artefact.save(artefact.load(private), odd, backbone={"name": "builtin:toy"})
    elif change == "backbone":
        write_peft_lora(stored, odd, base_model="elsewhere")
    elif change == "layout":
        config = replace(stored.config, blocks="0")
        few = tuple(site for site in stored.sites if site.block == 0)
        artefact.save(Adapter(config, few, task_names=["a"]), odd, backbone={"name": "builtin:toy"})
    else:
        config = replace(stored.config, kind="ia3")
        vectors = Adapter(config, stored.sites, task_names=["a"])
        write_peft_ia3(vectors, odd, base_model="builtin:toy")
    with pytest.raises(AdapterError, match=message):
        scores(library, tmp_path / "run")


def test_clusters_share_a_lora_that_is_trained_on_and_chosen_by_tokens(
    private: Path, tmp_path: Path
) -> None:
    config = ExportConfig(
        adapter=str(private),
        what="clusters",
        clusters=ClustersConfig(number=2),
        format="native",
        folder=str(tmp_path / "skills"),
    )
    export(config)
    skills = "adapter={layout: attention, rank: 2, n_skills: 2, policy: fixed}"
    trained = make_source(tmp_path / "toy", *SETTINGS, skills, f"source={tmp_path / 'skills'}")
    before, after = artefact.load(tmp_path / "skills"), artefact.load(trained)
    assert torch.equal(before.routing_logits, after.routing_logits)
    for own in members(before).values():
        first = artefact.named_tensors(collapse(after, own[0]))
        for other in own[1:]:
            of_other = artefact.named_tensors(collapse(after, other))
            for name, tensor in first.items():
                torch.testing.assert_close(of_other[name], tensor, rtol=1e-6, atol=1e-6)
    moved = after.inventory.stacked(after.inventory.stacks[0], "B")
    assert not torch.equal(moved, before.inventory.stacked(before.inventory.stacks[0], "B"))
    assert len(scores(trained, tmp_path / "run")) > 0


def test_a_library_has_so_many_loras_as_a_token_takes(private: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"arrow\.top_k: 99, of \d+ LoRA"):
        scores(private, tmp_path / "run", arrow=ArrowConfig(top_k=99))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="routing: arrow chooses"):
        EvaluateConfig(
            backbone={"name": "builtin:toy"},
            routing="arrow",
            tasks=TASKS,
            run=PlainRunConfig(folder="x"),
        )
    with pytest.raises(ConfigError, match="temperature: 0"):
        ArrowConfig(temperature=0.0)
