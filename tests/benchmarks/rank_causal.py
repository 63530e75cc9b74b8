"""Ranking choices with decoder-only models: what several texts begin with once, or again for each.

[MHR_SHARED=FOLDER] python tests/benchmarks/rank_causal.py [TURNS] [FOLDER ...]

Four choices behind prompts of 256 tokens:

one row a choice   mhr_scale.passes.scoring.rank_choices, each choice a row of its own
harness            lm-evaluation-harness's Hugging Face model on the same requests
branches           mhr_scale.passes.scoring.rank_choices, choices as branches behind their prompt

The same model in float32, rows and likelihoods (to 1e-4). The ways take turns; times are those of
the processor, ratios medians over turns. A small Llama of random weights, and the models of the
folders. The harness is an extra; to have it, in an environment of its own:

    python -m venv --system-site-packages VENV
    VENV/bin/pip install ".[lm-eval]" -c constraints.txt

Then two to four choices behind 40 tokens, behind an instruction of 80 tokens and demonstrations of
200 that all 32 rows of a task have; and of MHR_SHARED/data/superni_sample, with the models of the
folders, rows of tasks with at most four answers behind their definition and two examples:

padded             each row in a row of a rectangle, its choices behind it
flat               all rows in one sequence, without padding
shared             the same, what prompts begin with alike once
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from placed import place_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from mhr_scale.config import BackboneConfig, BatchConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import ConfigError
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes.scoring import rank_choices, split
from mhr_scale.rows.batching import cut_batches
from mhr_scale.rows.encode import Encoder
from mhr_scale.run import extras
from mhr_scale.tasks.superni import SuperNITasks
from mhr_scale.tasks.task import Intake

N_ROWS, N_CHOICES, N_PROMPT, MAX_CHOICE = 4, 4, 256, 6
MAX_TOKENS = 4096
LAYINGS: dict[str, dict[str, bool]] = {
    "padded": {},
    "flat": {"is_flat": True},
    "shared": {"is_flat": True, "is_shared": True},
}
Way = Callable[[], list[float]]


def main() -> None:
    """Time the ways for each model in turn and print medians and ratios."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    turns = int(sys.argv[1]) if sys.argv[1:] else 5
    models = {"Llama, random": make_llama}
    models |= {folder: lambda folder=folder: read(folder) for folder in sys.argv[2:]}
    for name, make in models.items():
        compare(name, place_model(make()), turns)
        model = make()
        CAUSAL.fuse(model, BackboneConfig(name=name))
        placed = place_model(model)
        compare_sharing(f"{name}, made-up prompts", placed, make_alike(model), turns)
        if Path(name).is_dir() and "MHR_SHARED" in os.environ:
            compare_sharing(f"{name}, SuperNI", placed, read_superni(name), turns)


def compare(name: str, placed: PlacedBackbone, turns: int) -> None:
    """One model: equal likelihoods first, then times."""
    rows = make_rows(placed.model.config.vocab_size)
    alone = [EncodedRow(row.input_ids, (choice,)) for row in rows for choice in row.answers]
    ways: dict[str, Way] = {"one row a choice": lambda: rank(placed, alone)}
    harness = make_harness(placed.model, alone)
    if harness is not None:
        ways["harness"] = harness
    ways["branches"] = lambda: rank(placed, rows)
    scores = {way: torch.tensor(run()) for way, run in ways.items()}
    parameters = sum(p.numel() for p in placed.model.parameters())
    print(f"{name}: {parameters / 1e6:.0f} million weights, {len(alone)} requests")
    for way, values in scores.items():
        furthest = (values - scores["branches"]).abs().max().item()
        assert furthest < 1e-4 * max(1.0, values.abs().max().item()), (way, furthest)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, run in ways.items():
            begun = time.process_time()
            run()
            times[way].append(time.process_time() - begun)
    for way, seconds in times.items():
        pairs = zip(seconds, times["branches"], strict=True)
        ratio = statistics.median(own / best for own, best in pairs)
        rate = N_ROWS / statistics.median(seconds)
        furthest = (scores[way] - scores["branches"]).abs().max().item()
        print(
            f"  {way:<18}{rate:7.2f} examples/s   branches are {ratio:.2f} times as fast   "
            f"furthest log-likelihood {furthest:.0e} of {scores[way].abs().max():.0f} nats"
        )


def compare_sharing(name: str, placed: PlacedBackbone, rows: list[EncodedRow], turns: int) -> None:
    """All rows in batches of 4,096 tokens, padded, flat, and with what prompts share once."""
    scores: dict[str, dict[int, list[float]]] = {}
    positions = dict.fromkeys(LAYINGS, 0)
    times: dict[str, list[float]] = {way: [] for way in LAYINGS}
    for way, options in LAYINGS.items():
        for batch in cut_batches(rows, max_tokens=MAX_TOKENS, **options):
            parts = [part for row in batch for part in split(row)]
            is_shared = options.get("is_shared", False)
            packed = placed.pack_shared(batch) if is_shared else placed.pack(parts, **options)
            positions[way] += packed.n_positions
    for _ in range(turns):
        for way, options in LAYINGS.items():
            begun = time.process_time()
            found: dict[int, list[float]] = {}
            for batch in cut_batches(rows, max_tokens=MAX_TOKENS, **options):
                ranked = rank_choices(placed, None, batch, length_norm=0.0, **options)
                found |= {row.number: own for row, own in zip(batch, ranked, strict=True)}
            times[way].append(time.process_time() - begun)
            scores[way] = found
    wanted = torch.tensor([value for row in rows for value in scores["padded"][row.number]])
    mean = sum(len(row.input_ids) for row in rows) / len(rows)
    print(f"{name}: {len(rows)} rows, prompts of {mean:.0f} tokens")
    for way, seconds in times.items():
        pairs = zip(seconds, times["shared"], strict=True)
        ratio = statistics.median(own / best for own, best in pairs)
        values = torch.tensor([value for row in rows for value in scores[way][row.number]])
        furthest = ((values - wanted) / wanted).abs().max().item()
        print(
            f"  {way:<18}{len(rows) / statistics.median(seconds):7.2f} examples/s   "
            f"{positions[way]:7} positions   shared is {ratio:.2f} times as fast   "
            f"furthest score {furthest:.0e}"
        )


def make_alike(model: Any) -> list[EncodedRow]:
    """Two tasks: an instruction and demonstrations, then short questions with some choices."""
    draw = np.random.default_rng(1)

    def ids(length: int) -> np.ndarray:
        return draw.integers(3, model.config.vocab_size, length)

    rows: list[EncodedRow] = []
    for task in range(2):
        alike = ids(280)
        for _ in range(32):
            prompt = np.concatenate([alike, ids(int(draw.integers(20, 60)))])
            n_choices = int(draw.integers(2, N_CHOICES + 1))
            choices = tuple(ids(int(draw.integers(2, MAX_CHOICE + 1))) for _ in range(n_choices))
            rows.append(EncodedRow(prompt, choices, task=task, number=len(rows)))
    return rows


def read_superni(folder: str) -> list[EncodedRow]:
    """24 held-out rows each of 4 tasks of the sample whose rows have few different answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    suite = SuperNITasks(
        suite="superni",
        folder=str(Path(os.environ["MHR_SHARED"]) / "data" / "superni_sample"),
        train_examples=100,
        validation_examples=24,
        positive_examples=2,
    )
    lengths = BatchConfig(max_input_tokens=1024, max_target_tokens=16)
    rows: list[EncodedRow] = []
    n_tasks = 0
    for task in suite.read_tasks(Intake(on_bad="skip")):
        answers = sorted({example.targets[0] for example in task.train})
        if not 2 <= len(answers) <= N_CHOICES or n_tasks == 4:
            continue
        encoder = Encoder(task, tokenizer, lengths, CAUSAL)
        choices = tuple(encoder.answers(answers))
        for prompt in encoder.inputs(task.validation):
            rows.append(EncodedRow(prompt, choices, task=n_tasks, number=len(rows)))
        n_tasks += 1
    return rows


def make_llama() -> Any:
    """A Llama of 8 blocks, width 512, grouped queries and 49,152 words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def read(folder: str) -> Any:
    """A stored model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_rows(n_words: int) -> list[EncodedRow]:
    """Prompts of 256 tokens with four choices of 2 to 6 tokens."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return draw.integers(3, n_words, length)

    return [
        EncodedRow(
            ids(N_PROMPT),
            tuple(ids(int(draw.integers(2, MAX_CHOICE + 1))) for _ in range(N_CHOICES)),
            number=number,
        )
        for number in range(N_ROWS)
    ]


def rank(placed: PlacedBackbone, rows: list[EncodedRow]) -> list[float]:
    """Summed log-likelihoods of all choices, in the order of rows."""
    scores = rank_choices(placed, None, rows, length_norm=0.0)
    return [-score for row in scores for score in row]


def make_harness(model: Any, alone: list[EncodedRow]) -> Way | None:
    """The harness's way to score the same requests; None, and why, without it."""
    try:
        extras.check("lm_eval", what="the harness")
    except ConfigError as error:
        print(f"  {error}")
        return None
    from lm_eval.models.huggingface import HFLM

    tokenizer = ByT5Tokenizer()  # requests come as tokens; it is never asked
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=len(alone), max_length=2048)
    requests = [
        ((str(n), ""), row.input_ids.tolist(), row.answers[0].tolist())
        for n, row in enumerate(alone)
    ]
    return lambda: [found for found, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


if __name__ == "__main__":
    main()
