"""Ranking four choices: all in one decoder row, against the two ways it is usually done.

python tests/benchmarks/rank_classification.py [RUNS]

looped     the whole model once per choice
repeated   the encoder once, its output repeated for every choice (T-Few, MTTL)
packed     mhr_scale.passes.scoring.rank_choices

The same model, rows and scores; the three take turns, and the ratios are medians over the turns.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from placed import place_model
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes.scoring import rank_choices

N_ROWS, N_CHOICES, N_INPUTS, MAX_CHOICE = 8, 4, 256, 6
VOCABULARY = 32128


def main() -> None:
    """Time the three ways in turn and print medians and ratios."""
    torch.set_num_threads(1)
    placed, rows = place_model(make_model()), make_rows()
    ways: dict[str, Callable[..., Tensor]] = {
        "looped": looped,
        "repeated": repeated,
        "packed": packed,
    }
    scores = {name: way(placed, rows) for name, way in ways.items()}
    for name in ("looped", "repeated"):
        torch.testing.assert_close(scores[name], scores["packed"], rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(int(sys.argv[1]) if sys.argv[1:] else 15):
        for name, way in ways.items():
            begun = time.perf_counter()
            way(placed, rows)
            times[name].append(time.perf_counter() - begun)
    for name, seconds in times.items():
        ratio = statistics.median(
            own / best for own, best in zip(seconds, times["packed"], strict=True)
        )
        rate = N_ROWS / statistics.median(seconds)
        print(f"{name:<10}{rate:8.1f} examples/s   packed is {ratio:.2f} times as fast")


def make_model() -> T5ForConditionalGeneration:
    """A T5 v1.1 of 4 + 4 blocks with T5-XL's proportions."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=256,
        d_kv=32,
        d_ff=640,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=8,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def make_rows() -> list[EncodedRow]:
    """Rows of 256 input tokens with four choices of 2 to 6 tokens."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return np.append(draw.integers(2, VOCABULARY, length - 1), 1)

    return [
        EncodedRow(
            ids(N_INPUTS),
            tuple(ids(int(draw.integers(2, MAX_CHOICE + 1))) for _ in range(N_CHOICES)),
            number=number,
        )
        for number in range(N_ROWS)
    ]


def packed(placed: PlacedBackbone, rows: list[EncodedRow]) -> Tensor:
    """The library's way."""
    return torch.tensor(rank_choices(placed, None, rows, length_norm=1.0))


@torch.no_grad()
def looped(placed: PlacedBackbone, rows: list[EncodedRow]) -> Tensor:
    """One call of the whole model per choice."""
    inputs_BL = torch.tensor(np.stack([row.input_ids for row in rows]))
    scores = []
    for which in range(N_CHOICES):
        labels_BL = padded([row.answers[which] for row in rows])
        output = placed.model(
            input_ids=inputs_BL,
            attention_mask=torch.ones_like(inputs_BL),
            labels=labels_BL,
            use_cache=False,
        )
        scores.append(mean_loss(output.logits, labels_BL))
    return torch.stack(scores, dim=1)


@torch.no_grad()
def repeated(placed: PlacedBackbone, rows: list[EncodedRow]) -> Tensor:
    """The encoder once, then one decoder row per choice."""
    inputs_BL = torch.tensor(np.stack([row.input_ids for row in rows]))
    mask_BL = torch.ones_like(inputs_BL)
    hidden = placed.model.encoder(input_ids=inputs_BL, attention_mask=mask_BL).last_hidden_state
    labels = padded([choice for row in rows for choice in row.answers])
    output = placed.model(
        encoder_outputs=(hidden.repeat_interleave(N_CHOICES, dim=0),),
        attention_mask=mask_BL.repeat_interleave(N_CHOICES, dim=0),
        labels=labels,
        use_cache=False,
    )
    return mean_loss(output.logits, labels).view(len(rows), N_CHOICES)


def padded(choices: list[np.ndarray]) -> Tensor:
    """Labels, -100 where padded."""
    tensors = [torch.tensor(choice) for choice in choices]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-100)


def mean_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's tokens."""
    loss_BL = F.cross_entropy(
        logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=-100, reduction="none"
    ).view(labels_BL.shape)
    return loss_BL.sum(1) / (labels_BL != -100).sum(1)


if __name__ == "__main__":
    main()
