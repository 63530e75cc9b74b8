"""What `evaluate` can be given besides an artefact of ours; references score in full."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import make_source

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, find_sites
from mhr_scale.adapters.collapse import average, soup
from mhr_scale.adapters.peft_folders import write_peft_lora
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import (
    BackboneConfig,
    EvaluateConfig,
    PlainRunConfig,
    ScoringConfig,
    SoupConfig,
    SuperNITasks,
    ToyTasks,
)
from mhr_scale.errors import AdapterError, ConfigError, RunError
from mhr_scale.scores import summary
from mhr_scale.tasks.metrics import rouge_l
from mhr_scale.tasks.suites import read_evaluation
from mhr_scale.verbs.evaluate import evaluate

SETTINGS = ("tasks.validation_examples=5", "tasks.instruction=full")
TASKS = ToyTasks(
    suite="toy", n_tasks=4, train_examples=10, validation_examples=5, instruction="full"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("runs") / "toy", *SETTINGS)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "toy"
    adapter = "adapter={layout: attention, rank: 2, n_skills: 1, private: true}"
    return make_source(folder, *SETTINGS, adapter)


def choice_scores(adapter: Path, folder: Path, **changes: object) -> dict[str, list[float]]:
    config = EvaluateConfig(
        adapter=str(adapter),
        tasks=TASKS,
        scoring=ScoringConfig(metric="accuracy"),
        run=PlainRunConfig(folder=str(folder)),
    )
    evaluate(replace(config, **changes))
    lines = summary.read_scores(folder / "scores.jsonl")
    return {line["id"]: line["choice_scores"] for line in lines}


def test_a_peft_folder_scores_as_the_adapter_it_came_from(trained: Path, tmp_path: Path) -> None:
    mean = average(artefact.load(trained))
    write_peft_lora(mean, tmp_path / "peft", base_model="builtin:toy")
    found = choice_scores(tmp_path / "peft", tmp_path / "found", backbone_dtype="float32")
    expected = choice_scores(trained, tmp_path / "expected", routing="average")
    assert found == expected


def test_the_vectors_of_tfew_score_over_the_backbone_that_is_named(
    trained: Path, tmp_path: Path
) -> None:
    model = make_model(read_blueprint(BackboneConfig(name="builtin:toy")))
    sites = find_sites(model, "light")
    generator = torch.Generator().manual_seed(0)
    vectors = {
        f"{site.name}.multi_lora_b": 1
        + 0.3 * torch.randn(site.out_features, 1, generator=generator)
        for site in sites
    }
    file = tmp_path / "finish.pt"
    torch.save(vectors, file)
    settings = {"backbone_moved_to": "builtin:toy", "backbone_dtype": "float32"}
    found = choice_scores(file, tmp_path / "found", **settings)
    adapter = Adapter(
        AdapterConfig(kind="ia3", layout="light", n_skills=1), sites, task_names=["a"]
    )
    for name, tensor in artefact.named_tensors(adapter).items():
        tensor[0, 0] = vectors[f"{name.removesuffix('.l')}.multi_lora_b"][:, 0]
    artefact.save(adapter, tmp_path / "ours")
    assert found == choice_scores(tmp_path / "ours", tmp_path / "expected", **settings)


def test_a_soup_scores_each_task_under_its_similar_tasks(private: Path, tmp_path: Path) -> None:
    soups = SoupConfig(adapters=1, examples=10)
    found = choice_scores(private, tmp_path / "soup", routing="soup", soup=soups)
    own = choice_scores(private, tmp_path / "own", routing="own")
    for identity, scores in own.items():  # with instruction, a task is the one most like itself
        assert found[identity] == pytest.approx(scores, rel=1e-5)


def test_a_soup_of_all_tasks_is_their_mean(private: Path, tmp_path: Path) -> None:
    soups = SoupConfig(adapters=4, examples=5)
    found = choice_scores(private, tmp_path / "soup", routing="soup", soup=soups)
    stored = artefact.load(private)
    card = artefact.read_card(private)
    artefact.save(soup(stored, stored.task_names), tmp_path / "mean", backbone=card.backbone)
    expected = choice_scores(tmp_path / "mean", tmp_path / "expected")
    for identity, scores in expected.items():
        assert found[identity] == pytest.approx(scores, rel=1e-5)


def test_a_soup_needs_private_adapters(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a soup is made of private adapters, this is MHR"):
        choice_scores(trained, tmp_path / "run", routing="soup")


def test_a_soup_needs_the_run_of_its_adapters(private: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="name the run folder"):
        choice_scores(private / "adapter", tmp_path / "run", routing="soup")


def test_a_bare_backbone_has_no_soup() -> None:
    with pytest.raises(ConfigError, match="routing: soup"):
        EvaluateConfig(
            backbone={"name": "builtin:toy"},
            routing="soup",
            tasks=TASKS,
            run=PlainRunConfig(folder="x"),
        )


def test_an_adapter_of_fine_tuned_weights_is_refused(trained: Path, tmp_path: Path) -> None:
    card = artefact.read_card(trained)
    origin = {"backbone": "backbone.safetensors"}
    artefact.save(artefact.load(trained), tmp_path / "job", backbone=card.backbone, origin=origin)
    with pytest.raises(AdapterError, match=r"together with the backbone's weights, in backbone\."):
        choice_scores(tmp_path / "job", tmp_path / "run")


def test_references_of_real_tasks_score_100_against_themselves(shared: Path) -> None:
    config = SuperNITasks(suite="superni", folder=str(shared / "data/superni_sample"), fold="test")
    tasks, _ = read_evaluation(config, examples=None)
    texts = {text for task in tasks for example in task.test for text in example.targets}
    counted = [text for text in texts if re.search("[a-z0-9]", text.lower())]
    assert len(tasks) == 20
    assert len(counted) > 1000
    assert {rouge_l(text, [text, "something else"]) for text in counted} == {100.0}
