"""How long the rows of a plan are: at most, and on average as a pass has them.

At most they are as long as the recipe cuts them, or `workload` says. On average they are as
`workload` says or, in pre-training, as the rows in the recipe's cache of tokens are, from which the
first steps are drawn as a run draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import PretrainConfig, WorkloadConfig
from mhr_scale.errors import ConfigError, UserError
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.planning.steps import Shape
from mhr_scale.rows.batching import cut_batches, draw_rows
from mhr_scale.rows.tokens import TokenSet, find_tokens
from mhr_scale.training.opening import make_plan

#: Steps whose rows are drawn.
DRAWN = 64


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of inputs and of targets (or choices): the most, and those of a row on average.

    `padded` are the latter with the padding of micro batches of equally many rows, and `padding` is
    its share of all; None: not known.
    """

    is_flat: bool
    most: tuple[int, int]
    mean: tuple[float, float]
    source: str | None = None
    padded: tuple[float, float] | None = None
    padding: float | None = None

    @property
    def tokens(self) -> float:
        """Tokens of a row on average, padding apart."""
        return sum(self.mean)

    @property
    def in_pass(self) -> tuple[float, float]:
        """Those that a row has in a pass on average, with its padding, as far as is known."""
        return self.mean if self.is_flat else self.padded or self.most

    def usual(self, shape: Shape) -> Shape:
        """The shape of the rows that a pass has on average, beside the longest there are."""
        if self.in_pass == self.most:
            return shape
        width, depth = (max(1, round(length)) for length in self.in_pass)
        room = self.most if self.is_flat else (0, 0)
        return replace(shape, width=width, depth=depth, room=room)

    def notes(self, setting: str) -> list[str]:
        """What a plan assumes of the rows; `setting` is the one that packs them."""
        way = "packed, without padding" if self.is_flat else "padded to the longest of their batch"
        if self.in_pass == self.most:
            time = (
                "time too, for want of workload.mean_input_tokens" if self.is_flat else "time too"
            )
        else:
            time = f"time that of {_sum(self.in_pass)} ({self.source})"
        lines = [
            f"rows are {way} ({setting}): memory is that of rows as long as they may be, "
            f"{_sum(self.most)} tokens, {time}"
        ]
        if self.padding is not None:
            lines.append(
                f"padding of micro batches of equally many rows: {self.padding:.0%} of their "
                "tokens; of packed rows: none, but in attention"
            )
        return lines


def _sum(lengths: tuple[float, float]) -> str:
    return " + ".join(f"{length:.4g}" for length in lengths)


def lengths_of(workload: WorkloadConfig, most: tuple[int, int], *, is_flat: bool) -> Lengths:
    """Lengths of rows that are known from the settings of the plan alone.

    Raises `ConfigError` for rows that are longer on average than the longest.
    """
    given = {
        "mean_input_tokens": workload.mean_input_tokens,
        "mean_target_tokens": workload.mean_target_tokens,
    }
    for (name, mean), longest in zip(given.items(), most, strict=True):
        if mean is not None and mean > longest:
            raise ConfigError(
                f"workload.{name}: {mean:g} is above the {longest} tokens that rows have at most"
            )
    width, depth = (
        longest if mean is None else mean
        for mean, longest in zip(given.values(), most, strict=True)
    )
    names = [f"workload.{name}" for name, mean in given.items() if mean is not None]
    return Lengths(
        is_flat=is_flat, most=most, mean=(width, depth), source=" and ".join(names) or None
    )


def lengths_of_run(config: PretrainConfig, workload: WorkloadConfig, *, is_flat: bool) -> Lengths:
    """Lengths of a run's rows: those of its cache of tokens, unless the plan's settings say."""
    batch = config.batch
    most = (
        workload.input_tokens or batch.max_input_tokens,
        workload.target_tokens or batch.max_target_tokens,
    )
    found = lengths_of(workload, most, is_flat=is_flat)
    given = (workload.input_tokens, workload.target_tokens)
    tokens = _find_tokens(config) if found.source is None and given == (None, None) else None
    return found if tokens is None else _measure(config, tokens, most, is_flat=is_flat)


def _find_tokens(config: PretrainConfig) -> TokenSet | None:
    """The tokens of the recipe's rows, if they lie in its cache; None too if nobody can tell."""
    if config.run.token_cache is None:
        return None
    try:
        blueprint = read_blueprint(config.backbone)
        tokenizer = load_tokenizer(config.backbone, blueprint)
        return find_tokens(
            config.tasks, tokenizer, config.batch, blueprint.family, config.run.token_cache
        )
    except (UserError, OSError):  # of the backbone, its tokenizer or the sources nothing is here
        return None


def _measure(
    config: PretrainConfig, tokens: TokenSet, most: tuple[int, int], *, is_flat: bool
) -> Lengths:
    blueprint, batch = read_blueprint(config.backbone), config.batch
    plan, size = make_plan(config, tokens), config.batch.batch_size
    rows: list[EncodedRow] = []
    padded: list[Packed] = []
    for step in range(min(DRAWN, config.schedule.steps)):
        drawn = draw_rows(
            plan.samples(step * size, (step + 1) * size),
            tokens.train,
            references=config.tasks.target_choice(),
            seed=config.run.seed,
        )
        rows += drawn
        padded += [
            blueprint.family.pack(micro, blueprint.model_config, pad_multiple=batch.pad_multiple)
            for micro in cut_batches(drawn, max_rows=batch.micro_batch_size)
        ]
    n_positions = sum(packed.n_positions for packed in padded)
    depth = _mean([packed.labels_BD.shape[1] for packed in padded for _ in packed.rows])
    return Lengths(
        is_flat=is_flat,
        most=most,
        mean=(_mean([len(r.input_ids) for r in rows]), _mean([r.n_answer_tokens for r in rows])),
        source="run.token_cache",
        padded=(n_positions / len(rows) - depth, depth),
        padding=sum(packed.n_padding for packed in padded) / n_positions,
    )


def _mean(numbers: Sequence[Any]) -> float:
    return float(sum(numbers) / len(numbers))
