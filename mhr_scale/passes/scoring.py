"""Ranking answer choices and generating answers, in batches filled by token count.

Shape letters: B batch rows (examples), L input tokens, D decoder tokens, V vocabulary.

All choices of an example stand side by side in one decoder row, under a mask that is causal inside
a choice and shut between choices. T5's position bias depends on the distance of two tokens only, so
every choice sees what it would see alone, while the encoder and the keys and values of
cross-attention run once per example.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhr_scale.adapters import Adapter
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import DataError, DivergenceError
from mhr_scale.rows.batching import pad
from mhr_scale.rows.encode import Ids
from mhr_scale.run import stopping

#: Inputs are padded to a multiple of this: attention kernels want aligned masks.
PAD_MULTIPLE = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """One example to score: its number in the job, its task, and its token ids.

    Each choice ends with the end-of-sequence token. Rows to generate from have no choices.
    """

    number: int
    task: int
    input_ids: Ids
    choices: tuple[Ids, ...] = ()

    def __post_init__(self) -> None:
        if not all(len(choice) for choice in self.choices):
            raise DataError(f"row {self.number}: a choice has no tokens; end it with </s>")

    @property
    def n_choice_tokens(self) -> int:
        """Decoder positions the row takes."""
        return sum(len(choice) for choice in self.choices)


Batch = list[ChoiceRow]


# -- batches: pure functions ---------------------------------------------------------------------


def fill_batches(rows: Sequence[ChoiceRow], max_tokens: int) -> list[Batch]:
    """Cut rows into batches of similar lengths, longest first; a task's rows side by side.

    A batch holds at most `max_tokens` padded tokens, inputs and choices together; a row that is
    longer than that makes a batch of its own.
    """
    by_length = sorted(
        rows, key=lambda r: (-len(r.input_ids), -r.n_choice_tokens, r.task, r.number)
    )
    batches: list[Batch] = []
    width = depth = 0
    for row in by_length:
        is_full = True
        if batches:
            wider, deeper = max(width, _padded(row)), max(depth, row.n_choice_tokens)
            is_full = (len(batches[-1]) + 1) * (wider + deeper) > max_tokens
        if is_full:
            batches.append([row])
            width, depth = _padded(row), row.n_choice_tokens
        else:
            batches[-1].append(row)
            width, depth = wider, deeper
    return [sorted(batch, key=lambda r: (r.task, r.number)) for batch in batches]


def deal(
    batches: Sequence[Batch], rank: int, world_size: int, *, is_sharded: bool
) -> list[tuple[Batch | None, bool]]:
    """A rank's batches, as many rounds on every rank, and whether each of them counts.

    Batch c goes to rank c mod W. A rank that has none left sits the last round out, or under ZeRO-3
    runs the shortest batch for company.
    """
    rounds: list[tuple[Batch | None, bool]] = [(b, True) for b in batches[rank::world_size]]
    n_rounds = -(-len(batches) // world_size)
    idle = batches[-1] if batches and is_sharded else None
    return rounds + [(idle, False)] * (n_rounds - len(rounds))


def _padded(row: ChoiceRow) -> int:
    return -(-len(row.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE


# -- the job -------------------------------------------------------------------------------------


def score(
    rows: Sequence[ChoiceRow],
    run: Callable[[Batch], list[T]],
    *,
    engine: Engine,
    max_tokens: int,
) -> Iterator[dict[int, T]]:
    """Run the rows still to do; after each round, yield its results by row number.

    Collective: every rank passes the same rows and iterates to the end, and gets all ranks'
    results. Raises `Stopped` on all ranks between two rounds if one was asked to stop. `run` gives
    a value for every row of a batch (`questions.answerers`).
    """
    assert len({row.number for row in rows}) == len(rows)
    batches = fill_batches(rows, max_tokens)
    rounds = deal(batches, engine.rank, engine.world_size, is_sharded=engine.is_sharded)
    is_stopped = False
    for batch, counts in rounds:
        if is_stopped:
            raise stopping.stop("all answers so far are written")
        found = run(batch) if batch is not None else []
        mine: dict[int, T] = {}
        if batch is not None and counts:
            mine = {row.number: value for row, value in zip(batch, found, strict=True)}
        results: dict[int, T] = {}
        for part, is_asked in engine.gather_objects((mine, stopping.is_asked())):
            results.update(part)
            is_stopped |= is_asked
        yield results


@contextmanager
def _evaluation(model: nn.Module, adapter: Adapter | None, batch: Batch) -> Iterator[None]:
    """Evaluation mode without gradients; the adapter, if any, under the rows' tasks."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        slots = nullcontext() if adapter is None else adapter.slots([row.task for row in batch])
        with torch.no_grad(), slots:
            yield
    finally:
        if was_training:
            model.train()


def pad_inputs(
    inputs: Sequence[Ids], *, pad_id: int, device: torch.device | str, at_least: int = 0
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, padded on the right to a multiple of `PAD_MULTIPLE`."""
    input_ids, mask = pad(inputs, pad_id=pad_id, multiple=PAD_MULTIPLE, at_least=at_least)
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


# -- ranking -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packed:
    """Choices side by side: decoder inputs, the tokens they are to predict, the choice of each.

    `blocks_BD` counts the choices of a row from 0; it is -1 where padded. `starts` holds, per row,
    where each choice begins.
    """

    decoder_input_ids_BD: Tensor
    targets_BD: Tensor
    blocks_BD: Tensor
    starts: tuple[tuple[int, ...], ...]

    @property
    def n_choices(self) -> int:
        """The most choices that a row has."""
        return max(len(starts) for starts in self.starts)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive (B, 1, D, D): 0 where a token may look, the smallest number elsewhere.

        Not boolean: eager attention would add it up as zeros and ones.
        """
        blocks_BD = self.blocks_BD
        is_open_BDD = (blocks_BD[:, :, None] == blocks_BD[:, None, :]).tril()
        shut = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=blocks_BD.device)
        return torch.where(is_open_BDD, torch.zeros_like(shut), shut)[:, None]


def pack_choices(
    choices: Sequence[Sequence[Ids]],
    *,
    start_id: int,
    pad_id: int,
    device: torch.device | str,
    at_least: int = 0,
) -> Packed:
    """Lay the choices of each row side by side, as wide as the row with most tokens, or wider.

    Every choice ends with the end-of-sequence token.
    """
    depth = max(at_least, *(sum(len(choice) for choice in row) for row in choices))
    inputs = np.full((len(choices), depth), pad_id, dtype=np.int64)
    targets = np.full((len(choices), depth), pad_id, dtype=np.int64)
    blocks = np.full((len(choices), depth), -1, dtype=np.int64)
    all_starts = []
    for number, row in enumerate(choices):
        starts, at = [], 0
        for block, choice in enumerate(row):
            end = at + len(choice)
            inputs[number, at] = start_id
            inputs[number, at + 1 : end] = choice[:-1]
            targets[number, at:end] = choice
            blocks[number, at:end] = block
            starts.append(at)
            at = end
        all_starts.append(tuple(starts))
    return Packed(
        torch.from_numpy(inputs).to(device),
        torch.from_numpy(targets).to(device),
        torch.from_numpy(blocks).to(device),
        tuple(all_starts),
    )


def run_choices(
    model: Any,
    inputs: Sequence[Ids],
    choices: Sequence[Sequence[Ids]],
    *,
    device: torch.device | str,
    at_least: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Packed]:
    """Logits (B, D, V) of every row's choices side by side, and the packed choices.

    Inputs and decoder rows are padded to the lengths `at_least`, or wider.
    """
    config, (width, depth) = model.config, at_least
    packed = pack_choices(
        choices,
        start_id=config.decoder_start_token_id,
        pad_id=config.pad_token_id,
        device=device,
        at_least=depth,
    )
    logits_BDV: Tensor = model(
        **pad_inputs(inputs, pad_id=config.pad_token_id, device=device, at_least=width),
        decoder_input_ids=packed.decoder_input_ids_BD,
        decoder_attention_mask=packed.mask(model.get_input_embeddings().weight.dtype),
        use_cache=False,
    ).logits
    return logits_BDV, packed


def rank_choices(
    model: Any,
    adapter: Adapter | None,
    batch: Batch,
    *,
    length_norm: float,
    device: torch.device | str = "cpu",
) -> list[list[float]]:
    """Score every choice of every row: the smallest wins.

    A score is the summed negative log-likelihood of a choice's tokens, end of sequence included, in
    float32, over length ** `length_norm`. Without an adapter the model runs as it stands: bare, or
    inside the caller's `adapter.off()`. Raises `DivergenceError` if a score is no number.
    """
    nll_BD, packed = choice_losses(model, adapter, batch, device=device)
    # the one wait for the device; sums on the host do not depend on the order of threads
    nll = nll_BD.cpu().numpy().reshape(len(batch), -1)
    scores = []
    for row, starts, nll_D in zip(batch, packed.starts, nll, strict=True):
        sums = np.add.reduceat(nll_D[: row.n_choice_tokens], starts)
        lengths = np.array([len(choice) for choice in row.choices], dtype=np.float32)
        values = (sums / lengths**length_norm).tolist()
        if not np.isfinite(values).all():
            raise DivergenceError(
                f"row {row.number}: the scores {values} are not finite; try the backbone in float32"
            )
        scores.append(values)
    return scores


def choice_losses(
    model: Any, adapter: Adapter | None, batch: Batch, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Packed]:
    """Negative log-likelihood of each choice's tokens, a row's choices side by side: (B * D,).

    In float32, on `device`; the packed choices tell which is which.
    """
    for row in batch:
        if not row.choices:
            raise DataError(f"row {row.number}: no choices to rank")
    inputs, choices = [row.input_ids for row in batch], [row.choices for row in batch]
    with _evaluation(model, adapter, batch):
        logits_BDV, packed = run_choices(model, inputs, choices, device=device)
    nll_BD = F.cross_entropy(
        logits_BDV.flatten(0, 1).float(), packed.targets_BD.flatten(), reduction="none"
    )
    return nll_BD, packed


# -- generation ----------------------------------------------------------------------------------


def generate_answers(
    model: Any,
    adapter: Adapter | None,
    batch: Batch,
    tokenizer: Any,
    *,
    beams: int,
    max_new_tokens: int,
    synced: bool = False,
    device: torch.device | str = "cpu",
) -> list[str]:
    """The best answer to each row, greedy or by beam search, as text without special tokens.

    `synced` makes ranks take as many steps as the slowest one: set it under ZeRO-3, where every
    step gathers weights.
    """
    inputs = [row.input_ids for row in batch]
    with _evaluation(model, adapter, batch):
        ids = model.generate(
            **pad_inputs(inputs, pad_id=model.config.pad_token_id, device=device),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            synced_gpus=synced,
        )
    texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
    return [text.strip() for text in texts]
