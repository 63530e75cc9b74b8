"""AdapterSoup: which training tasks are like a new one."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from placed import place_model
from processes import ROOT
from small_causal import small_causal
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mhr_scale.adapters import attach
from mhr_scale.adapters.sites import Site
from mhr_scale.backbone import hub
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.of_adapter import find_sites_of
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdapterConfig,
    BackboneConfig,
    BatchConfig,
    JsonlTasks,
    PretrainConfig,
    SoupConfig,
    ToyTasks,
)
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone, place
from mhr_scale.errors import BackboneError, DataError, RunError
from mhr_scale.families.t5 import make_byte_tokenizer
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
def embedder() -> TaskEmbedder:
    blueprint = read_blueprint(BARE)
    return TaskEmbedder(
        placed=place_bare(find_sites_of(blueprint, AdapterConfig(layout="attention"))),
        tokenizer=load_tokenizer(BARE, blueprint),
        lengths=BatchConfig(max_input_tokens=64),
    )


def place_bare(sites: Sequence[Site] = ()) -> PlacedBackbone:
    """The backbone on the CPU."""
    engine = Engine({}, timeout_seconds=60.0, device=torch.device("cpu"))
    return place(engine, BARE, read_blueprint(BARE), sites)


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


def silence(embedder: TaskEmbedder) -> None:
    for linear in embedder.placed.adapted.values():
        linear.is_off = True


# --- embeddings


@torch.no_grad()
def embed_plainly(embedder: TaskEmbedder, task) -> torch.Tensor:
    """Encoder states averaged over tokens, then over examples; one example at a time."""
    config, family = load(PretrainConfig, TOY).batch, embedder.placed.family
    rows = Encoder(task, embedder.tokenizer, config, family).rows(task.train)
    encoder = embedder.placed.model.get_encoder()
    means = [
        encoder(input_ids=torch.tensor(row.input_ids)[None]).last_hidden_state[0].mean(0)
        for row in rows
    ]
    mean = torch.stack(means).double().mean(0)
    return mean / mean.norm()


def test_an_embedding_is_the_mean_state_of_the_backbone_s_own_encoder(embedder, tasks):
    silence(embedder)
    found = gather_embeddings(tasks, SETTINGS, embedder)
    assert found.keys() == tasks.keys()
    for name, vector in found.items():
        expected = embed_plainly(embedder, tasks[name])
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)
        assert vector.norm().item() == pytest.approx(1.0)


def test_an_embedding_does_not_depend_on_the_tasks_beside_it(embedder, tasks):
    silence(embedder)
    together = gather_embeddings(tasks, SETTINGS, embedder)
    for name, task in tasks.items():
        alone = gather_embeddings({name: task}, SETTINGS, embedder)[name]
        torch.testing.assert_close(alone, together[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_decoder_only_backbone_gives_its_last_states_of_the_prompt(tasks):
    model = small_causal("llama", vocab_size=384, eos_token_id=1)
    decoder = TaskEmbedder(
        placed=place_model(model),
        tokenizer=make_byte_tokenizer(),
        lengths=BatchConfig(max_input_tokens=64),
    )
    found = gather_embeddings(tasks, SETTINGS, decoder)
    for name, task in tasks.items():
        texts = decoder.tokenizer([r.input for r in task.train], add_special_tokens=False)
        means = [
            model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            for ids in texts.input_ids
        ]
        mean = torch.stack(means).double().mean(0)
        torch.testing.assert_close(found[name], mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_a_decoder_only_model_may_stand_in_as_sentence_encoder(embedder, tasks, tmp_path):
    """Its tokenizer has no token to pad with."""
    small_causal("llama", vocab_size=384, eos_token_id=1).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"[UNK]": 0, "end": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end").save_pretrained(tmp_path)
    settings = replace(SETTINGS, encoder=str(tmp_path))
    found = gather_embeddings(tasks, settings, embedder)
    assert all(vector.norm().item() == pytest.approx(1.0) for vector in found.values())


def test_adapters_in_the_model_do_not_count(embedder, source, tasks):
    placed = place_bare()
    config = AdapterConfig(layout="attention", n_skills=1)
    adapter = attach(placed.model, config, tasks=["one"])
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    adapted = replace(embedder, placed=placed)
    found = gather_similar(str(source), list(tasks), tasks, SETTINGS, adapted)
    assert found == gather_similar(str(source), list(tasks), tasks, SETTINGS, embedder)


def test_a_sentence_encoder_can_stand_in_for_the_backbone(embedder, tasks):
    """Here it is the encoder of the same backbone, from its folder."""
    silence(embedder)
    settings = replace(SETTINGS, encoder=str(hub.BUILTIN["builtin:toy"]))
    own, other = (gather_embeddings(tasks, one, embedder) for one in (SETTINGS, settings))
    for name in tasks:
        assert float(own[name] @ other[name]) > 0.99


def test_a_sentence_encoder_that_is_not_there_is_named(embedder, tasks, tmp_path):
    settings = replace(SETTINGS, encoder=str(tmp_path))
    with pytest.raises(BackboneError, match=r"soup\.encoder: .*not a readable encoder"):
        gather_embeddings(tasks, settings, embedder)


def test_a_sentence_encoder_with_code_of_its_own_is_not_run(embedder, tasks, tmp_path, monkeypatch):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    settings = replace(SETTINGS, encoder=str(tmp_path))
    with pytest.raises(BackboneError, match=r"soup\.encoder: .*not a readable encoder"):
        gather_embeddings(tasks, settings, embedder)


# --- similar tasks


def test_a_task_is_most_similar_to_itself(embedder, source, tasks):
    """Told from other rows than those the training task is known by."""
    new = {name: replace(task, train=task.validation) for name, task in tasks.items()}
    found = gather_similar(str(source), list(tasks), new, SETTINGS, embedder)
    assert {name: similar[0] for name, similar in found.items()} == {name: name for name in tasks}
    assert all(len(set(similar)) == 3 for similar in found.values())


def test_a_task_may_come_in_several_draws_of_rows(embedder, source, tasks):
    (name, task), *_ = tasks.items()
    new = {(name, seed): replace(task, train=task.train[seed::2]) for seed in (0, 1)}
    found = gather_similar(str(source), list(tasks), new, SETTINGS, embedder)
    assert found.keys() == new.keys()
    assert [similar[0] for similar in found.values()] == [name, name]


def test_similar_tasks_are_the_same_every_time(embedder, source, tasks):
    names = list(tasks)
    first = gather_similar(str(source), names, tasks, SETTINGS, embedder)
    shuffled = random.Random(1).sample(names, len(names))
    again = gather_similar(
        str(source), shuffled, {name: tasks[name] for name in shuffled}, SETTINGS, embedder
    )
    assert first == again


def test_only_tasks_that_the_adapter_has_are_chosen(embedder, source, tasks):
    names = list(tasks)[:4]
    found = gather_similar(str(source), names, tasks, SETTINGS, embedder)
    assert {name for similar in found.values() for name in similar} <= set(names)


def test_similarity_is_the_cosine_and_of_equal_ones_the_first_by_name():
    directions = {"d": (0, 1), "c": (1, 0), "b": (0.6, 0.8), "a": (1, 0), "opposite": (-1, 0)}
    others = {name: torch.tensor(d, dtype=torch.float64) for name, d in directions.items()}
    vector = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert most_similar(vector, others, 5) == ["a", "c", "b", "d", "opposite"]
    assert most_similar(vector, others, 2) == ["a", "c"]


def test_a_task_s_embedding_takes_its_first_examples_up_to_a_number(embedder, source, tasks):
    settings = replace(SETTINGS, examples=2)
    long = dict(tasks)
    name, other = list(tasks)[:2]
    long[name] = replace(tasks[name], train=(*tasks[name].train[:2], *tasks[other].train))
    found = gather_similar(str(source), list(tasks), long, settings, embedder)
    assert found == gather_similar(str(source), list(tasks), tasks, settings, embedder)


# --- the run they come from


def test_training_tasks_are_read_again_from_the_recipe_of_the_run(source, tasks):
    names = list(tasks)[::-1]
    found = source_tasks(str(source), names, SoupConfig(examples=5))
    assert list(found) == names
    for name, task in found.items():
        assert task.train == tasks[name].train[:5]


def test_training_tasks_may_lie_elsewhere_now(source, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(source, run)
    rows = tmp_path / "rows" / "mine"
    rows.mkdir(parents=True)
    row = {"input": "a b", "target": "b a"}
    (rows / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    text = load(PretrainConfig, source / "config.yaml")
    moved = replace(text, tasks=JsonlTasks(suite="jsonl", folder="gone"))
    (run / "config.yaml").write_text(to_yaml(moved))
    with pytest.raises(DataError, match="no folder 'gone'") as refused:
        source_tasks(str(run), [], SETTINGS)
    assert "soup.tasks says where they are now" in refused.value.__notes__[0]
    settings = replace(SETTINGS, tasks={"folder": str(rows.parent)})
    assert list(source_tasks(str(run), ["mine"], settings)) == ["mine"]


def test_an_adapter_without_its_run_is_refused(source, tasks):
    with pytest.raises(RunError, match=r"adapter/config\.yaml: missing.*name the run folder"):
        source_tasks(str(source / "adapter"), list(tasks), SETTINGS)


def test_a_run_whose_data_lack_a_task_is_refused(source, tasks):
    with pytest.raises(RunError, match=r"its data lack 2 task.*such as gone"):
        source_tasks(str(source), [*tasks, "lost", "gone"], SETTINGS)
