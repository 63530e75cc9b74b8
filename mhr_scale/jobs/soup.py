"""AdapterSoup: which training tasks are similar to a new one (docs/method.md 8).

A task is the mean of its training examples' sentence embeddings; tasks are compared by cosine. The
encoder is the frozen backbone's, its states averaged over the tokens, or a sentence encoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.backbone import hub
from mhr_scale.config import BatchConfig, PretrainConfig, SoupConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import BackboneError, DataError, RunError, first_line
from mhr_scale.families.encoder_decoder import encoder_of
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes import scoring
from mhr_scale.recipe.reading import load, overrides_of
from mhr_scale.rows.batching import cut_batches
from mhr_scale.rows.encode import Encoder
from mhr_scale.run.repositories import last_found
from mhr_scale.run.run_folder import RECIPE
from mhr_scale.run.runlog import Progress
from mhr_scale.tasks.suites import open_suite
from mhr_scale.tasks.task import Example, Task

K = TypeVar("K")

#: Padded tokens per batch of inputs to embed.
MAX_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEmbedder:
    """The placed backbone and its tokenizer, which embed texts unless a sentence encoder does."""

    placed: PlacedBackbone
    tokenizer: Any
    lengths: BatchConfig


def gather_similar(
    source: str,
    names: Sequence[str],
    tasks: Mapping[K, Task],
    settings: SoupConfig,
    embedder: TaskEmbedder,
) -> dict[K, list[str]]:
    """The most similar training tasks of each task, by the inputs of its training examples.

    `source` is the run that trained private adapters for the tasks `names`. Collective.
    """
    known_tasks = source_tasks(source, names, settings)
    new = {key: _first(task, task.train, settings.examples) for key, task in tasks.items()}
    with adapters_off(embedder.placed.model):
        known = gather_embeddings(known_tasks, settings, embedder)
        vectors = gather_embeddings(new, settings, embedder)
    return {key: most_similar(vector, known, settings.adapters) for key, vector in vectors.items()}


def source_tasks(adapter: str, names: Sequence[str], settings: SoupConfig) -> dict[str, Task]:
    """The tasks an adapter was trained on, with their first training examples.

    Read again by the recipe of its run; raises `RunError` if that is missing.
    """
    file = find_recipe(adapter)
    suite = load(PretrainConfig, file, overrides_of("tasks", settings.tasks)).tasks
    try:
        reading = open_suite(suite)
    except DataError as error:
        error.add_note(f"these are the tasks of {adapter}: soup.tasks says where they are now")
        raise
    tasks = {task.name: _first(task, task.train, settings.examples) for task in reading.tasks}
    missing = sorted(set(names) - tasks.keys())
    if missing:
        raise RunError(f"{file}: its data lack {len(missing)} task(s), such as {missing[0]}")
    return {name: tasks[name] for name in names}


def find_recipe(adapter: str) -> Path:
    """The recipe of the run that trained private adapters; raises `RunError` if it is missing."""
    file = last_found(adapter).path / RECIPE
    if not file.is_file():
        raise RunError(
            f"{file}: missing; a soup compares tasks by their training examples, so name the run "
            "folder of the private adapters, not the adapter in it"
        )
    return file


def _first(task: Task, rows: Sequence[Example], count: int) -> Task:
    return replace(task, train=tuple(rows[:count]), validation=(), test=())


def gather_embeddings(
    tasks: Mapping[K, Task], settings: SoupConfig, embedder: TaskEmbedder
) -> dict[K, Tensor]:
    """Mean embedding of each task's training inputs, normalised to length 1. Collective.

    The adapters in the model must be off.
    """
    placed = embedder.placed
    if settings.encoder is not None:
        encode = load_sentence_encoder(settings.encoder, placed.device)
        return {
            key: _unit(encode([example.input for example in task.train]))
            for key, task in tasks.items()
        }
    rows: list[EncodedRow] = []
    counts = []
    for task in tasks.values():
        encoder = Encoder(task, embedder.tokenizer, embedder.lengths, placed.family)
        inputs = encoder.inputs(task.train)
        rows += [EncodedRow(ids, number=len(rows) + n) for n, ids in enumerate(inputs)]
        counts.append(len(inputs))
    placed.model.eval()
    embeddings: dict[int, list[float]] = {}
    progress = Progress(len(rows), start=0, what="embed", unit="example")
    run: Callable[[list[EncodedRow]], list[list[float]]] = partial(_embed, placed)
    batches = cut_batches(rows, max_tokens=MAX_TOKENS)
    for results in scoring.score(batches, run, engine=placed.engine):
        embeddings.update(results)
        progress.advance("similar tasks", by=len(results))
    progress.close()
    vectors = torch.tensor([embeddings[number] for number in range(len(rows))])
    parts = vectors.split(counts)
    return {key: _unit(part) for key, part in zip(tasks, parts, strict=True)}


@torch.no_grad()
def _embed(placed: PlacedBackbone, batch: list[EncodedRow]) -> list[list[float]]:
    states_BLH, mask_BL = placed.family.states(placed.model, placed.pack(batch))
    embeddings: list[list[float]] = mean_states(states_BLH, mask_BL).tolist()
    return embeddings


def _unit(vectors_EH: Tensor) -> Tensor:
    return F.normalize(vectors_EH.double().mean(0), dim=0)


def most_similar(vector: Tensor, others: Mapping[str, Tensor], count: int) -> list[str]:
    """The names of the most similar tasks, most similar first; ties are broken by name."""
    similarity = {name: float(vector @ other) for name, other in others.items()}
    return sorted(similarity, key=lambda name: (-similarity[name], name))[:count]


def mean_states(states_BLH: Tensor, mask_BL: Tensor) -> Tensor:
    """Hidden states averaged over the tokens of each text: (B, H), float32."""
    mask_BL1 = mask_BL.unsqueeze(-1)
    mean_BH: Tensor = (states_BLH.float() * mask_BL1).sum(1) / mask_BL1.sum(1)
    return mean_BH


def load_sentence_encoder(name: str, device: torch.device) -> Callable[[list[str]], Tensor]:
    """A function from texts to vectors (texts, H): the mean states of a hub id or a folder.

    Raises `BackboneError` if it cannot be read.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = hub.find_folder(name, None, setting="soup.encoder")
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=False).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise BackboneError(
            f"soup.encoder: {name}: not a readable encoder ({first_line(error)}); give a "
            "folder or a hub id"
        ) from error
    if tokenizer.pad_token is None:  # masks tell padding, whatever it is
        tokenizer.pad_token = tokenizer.eos_token
    encoder = encoder_of(model)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        vectors = []
        for start in range(0, len(texts), 32):
            batch = texts[start : start + 32]
            inputs = tokenizer(
                batch, padding=True, padding_side="right", truncation=True, return_tensors="pt"
            ).to(device)
            names = ("input_ids", "attention_mask")
            states = encoder(**{name: inputs[name] for name in names}).last_hidden_state
            vectors.append(mean_states(states, inputs["attention_mask"]).cpu())
        return torch.cat(vectors)

    return encode
