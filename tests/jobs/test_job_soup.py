"""AdapterSoup: which training tasks are like a new one."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import ROOT

from mhr_scale.adapters import attach, find_sites
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.backbone import hub
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import AdapterConfig, BackboneConfig, PretrainConfig, SoupConfig, ToyTasks
from mhr_scale.engine.ds_config import read_ds_config
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError, RunError
from mhr_scale.jobs.soup import (
    TaskEmbedder,
    gather_embeddings,
    gather_similar,
    most_similar,
    source_tasks,
)
from mhr_scale.recipe.reading import load, to_yaml
from mhr_scale.rows.encode import Encoder
from mhr_scale.tasks import toy

TOY = str(ROOT / "launch" / "recipes" / "toy.yaml")
#: Inputs that tell the task: their embeddings do too.
SUITE = ToyTasks(
    suite="toy", n_tasks=6, train_examples=12, validation_examples=8, instruction="full"
)
BARE = BackboneConfig(name="builtin:toy", dtype="float32")
SETTINGS = SoupConfig(adapters=3, examples=12)


@pytest.fixture(scope="module")
def kitchen() -> TaskEmbedder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        engine = Engine(read_ds_config(None), timeout_seconds=60.0)
    blueprint = read_blueprint(BARE)
    model = engine.build(BARE, blueprint)
    return TaskEmbedder(
        engine=engine,
        model=model,
        linears=wrap(model, find_sites(model, "attention")),
        tokenizer=load_tokenizer(BARE, blueprint),
        max_input_tokens=64,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run folder, as far as a soup reads it."""
    folder = tmp_path_factory.mktemp("source")
    config = replace(load(PretrainConfig, TOY), tasks=SUITE)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture(scope="module")
def tasks() -> dict[str, toy.Task]:
    return {task.name: task for task in toy.make_tasks(SUITE)}


def silence(kitchen: TaskEmbedder) -> None:
    for linear in kitchen.linears.values():
        linear.is_off = True


# --- embeddings


@torch.no_grad()
def embed_plainly(kitchen: TaskEmbedder, task) -> torch.Tensor:
    """Encoder states averaged over tokens, then over examples; one example at a time."""
    rows = Encoder(task, kitchen.tokenizer, load(PretrainConfig, TOY).batch).rows(task.train)
    encoder = kitchen.model.get_encoder()
    means = [
        encoder(input_ids=torch.tensor(row.input_ids)[None]).last_hidden_state[0].mean(0)
        for row in rows
    ]
    mean = torch.stack(means).double().mean(0)
    return mean / mean.norm()


def test_an_embedding_is_the_mean_state_of_the_backbone_s_own_encoder(kitchen, tasks):
    silence(kitchen)
    found = gather_embeddings(tasks, SETTINGS, kitchen)
    assert found.keys() == tasks.keys()
    for name, vector in found.items():
        expected = embed_plainly(kitchen, tasks[name])
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)
        assert vector.norm().item() == pytest.approx(1.0)


def test_an_embedding_does_not_depend_on_the_tasks_beside_it(kitchen, tasks):
    silence(kitchen)
    together = gather_embeddings(tasks, SETTINGS, kitchen)
    for name, task in tasks.items():
        alone = gather_embeddings({name: task}, SETTINGS, kitchen)[name]
        torch.testing.assert_close(alone, together[name], rtol=1e-5, atol=1e-6)


def test_adapters_in_the_model_do_not_count(kitchen, source, tasks):
    model = kitchen.engine.build(BARE, read_blueprint(BARE))
    adapter = attach(model, AdapterConfig(layout="attention", n_skills=1), tasks=["one"])
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    linears = {linear.name: linear for linear in adapter.linears}
    adapted = replace(kitchen, model=model, linears=linears)
    found = gather_similar(str(source), list(tasks), tasks, SETTINGS, adapted)
    assert found == gather_similar(str(source), list(tasks), tasks, SETTINGS, kitchen)


def test_a_sentence_encoder_can_stand_in_for_the_backbone(kitchen, tasks):
    """Here it is the encoder of the same backbone, from its folder."""
    silence(kitchen)
    settings = replace(SETTINGS, encoder=str(hub.BUILTIN["builtin:toy"]))
    own, other = (gather_embeddings(tasks, one, kitchen) for one in (SETTINGS, settings))
    for name in tasks:
        assert float(own[name] @ other[name]) > 0.99


def test_a_sentence_encoder_that_is_not_there_is_named(kitchen, tasks, tmp_path):
    settings = replace(SETTINGS, encoder=str(tmp_path))
    with pytest.raises(BackboneError, match=r"soup\.encoder: .*not a readable encoder"):
        gather_embeddings(tasks, settings, kitchen)


# --- similar tasks


def test_a_task_is_most_similar_to_itself(kitchen, source, tasks):
    """Told from other rows than those the training task is known by."""
    new = {name: replace(task, train=task.validation) for name, task in tasks.items()}
    found = gather_similar(str(source), list(tasks), new, SETTINGS, kitchen)
    assert {name: similar[0] for name, similar in found.items()} == {name: name for name in tasks}
    assert all(len(set(similar)) == 3 for similar in found.values())


def test_a_task_may_come_in_several_draws_of_rows(kitchen, source, tasks):
    (name, task), *_ = tasks.items()
    new = {(name, seed): replace(task, train=task.train[seed::2]) for seed in (0, 1)}
    found = gather_similar(str(source), list(tasks), new, SETTINGS, kitchen)
    assert found.keys() == new.keys()
    assert [similar[0] for similar in found.values()] == [name, name]


def test_similar_tasks_are_the_same_every_time(kitchen, source, tasks):
    names = list(tasks)
    first = gather_similar(str(source), names, tasks, SETTINGS, kitchen)
    shuffled = random.Random(1).sample(names, len(names))
    again = gather_similar(
        str(source), shuffled, {name: tasks[name] for name in shuffled}, SETTINGS, kitchen
    )
    assert first == again


def test_only_tasks_that_the_adapter_has_are_chosen(kitchen, source, tasks):
    names = list(tasks)[:4]
    found = gather_similar(str(source), names, tasks, SETTINGS, kitchen)
    assert {name for similar in found.values() for name in similar} <= set(names)


def test_similarity_is_the_cosine_and_of_equal_ones_the_first_by_name():
    directions = {"d": (0, 1), "c": (1, 0), "b": (0.6, 0.8), "a": (1, 0), "opposite": (-1, 0)}
    others = {name: torch.tensor(d, dtype=torch.float64) for name, d in directions.items()}
    vector = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert most_similar(vector, others, 5) == ["a", "c", "b", "d", "opposite"]
    assert most_similar(vector, others, 2) == ["a", "c"]


def test_a_task_s_embedding_takes_its_first_examples_up_to_a_number(kitchen, source, tasks):
    settings = replace(SETTINGS, examples=2)
    long = dict(tasks)
    name, other = list(tasks)[:2]
    long[name] = replace(tasks[name], train=(*tasks[name].train[:2], *tasks[other].train))
    found = gather_similar(str(source), list(tasks), long, settings, kitchen)
    assert found == gather_similar(str(source), list(tasks), tasks, settings, kitchen)


# --- the run they come from


def test_training_tasks_are_read_again_from_the_recipe_of_the_run(source, tasks):
    names = list(tasks)[::-1]
    found = source_tasks(str(source), names, 5)
    assert list(found) == names
    for name, task in found.items():
        assert task.train == tasks[name].train[:5]


def test_an_adapter_without_its_run_is_refused(source, tasks):
    with pytest.raises(RunError, match=r"adapter/config\.yaml: missing.*name the run folder"):
        source_tasks(str(source / "adapter"), list(tasks), 5)


def test_a_run_whose_data_lack_a_task_is_refused(source, tasks):
    with pytest.raises(RunError, match=r"its data lack 2 task.*such as gone"):
        source_tasks(str(source), [*tasks, "lost", "gone"], 5)
