"""The order in which a run sees the rows of its tasks.

A `MixturePlan` maps a sample number to a row of a task. The stream is a pure function of the plan,
its seed and that number: nothing is consumed, any range can be asked for in any order, and a run
resumes from one integer on any number of ranks or workers.

The stream is a chain of epochs. An epoch is made of draws, a draw being `group` consecutive samples
of one task; each task has the same number of draws in every epoch. An epoch is cut into blocks of
about 65,536 samples. A block has each task's part of the epoch's draws, rounded up or down, in a
shuffled order of its own. So any block is made by itself, in milliseconds, and nothing is ever as
large as an epoch.

A task's visits are counted through all epochs, and its rows are walked in passes, each a new
shuffle of all its rows: a capped task goes on through its own rows epoch by epoch, and no row of it
comes twice before every row came once. A pass is a keyed permutation: its rows are computed, not
looked up.

All randomness is SplitMix64: integer arithmetic, the same in every release of NumPy, which the
streams of its `Generator` methods are not.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhr_scale.errors import ConfigError, DataError, suggest
from mhr_scale.recipe.part import part

__all__ = ["MixtureConfig", "MixturePlan", "Sample", "Share"]

FORMAT = 2
"""Number of the rules in this file; raise it whenever a plan starts to give another stream."""

BLOCK = 65_536
"""Samples of a block, about."""

BLOCKS_KEPT = 2
"""Blocks held in memory: a range that crosses from one to the next needs both."""

ROUNDS = 16
"""Rounds of the keyed permutation; with fewer, tasks of five to ten rows prefer some orders."""

MOST_DRAWS = 2**31
"""Limit of the draws of an epoch; their products with block numbers stay far below 64 bits."""


@part
class MixtureConfig:
    """How tasks share the stream of samples."""

    cap: int | None = None
    """Rows of a task that count in one epoch; a task's own `cap` is stronger."""
    temperature: float = 1.0
    """Shares are (capped size) ** (1 / temperature)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Fixed relative weights by task name; a task without one keeps its share."""
    first_rows: bool = False
    """Repeat a capped task's first rows every epoch instead of walking on through the task."""
    group: int = 1
    """Consecutive samples of one task per draw (MHR mixes distinct tasks only: 4 means fewer)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0.0:
            raise ConfigError(f"mixture.temperature: {self.temperature} is not above 0")
        if self.group < 1:
            raise ConfigError(f"mixture.group: {self.group} is not at least 1")
        if self.cap is not None and self.cap < 1:
            raise ConfigError(f"mixture.cap: {self.cap} is not at least 1")


@dataclass(frozen=True, slots=True)
class Sample:
    """One place in the stream: row `row` of the training rows of the plan's task `task`."""

    number: int
    task: int
    row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What the plan has to know about a task: its name, number of rows, own cap and own weight."""

    name: str
    size: int
    cap: int | None = None
    weight: float | None = None


class MixturePlan:
    """A random-access stream of samples over tasks.

    A task's share is its capped size; under a temperature T it is (capped size) ** (1 / T), scaled
    so that the shares still add up to the sum of the capped sizes. A weight replaces the share by
    weight x (mean of all shares before weights), so 1.0 means "as much as the average task"; tasks
    without a weight keep their share, and the epoch grows or shrinks accordingly.

    Shares become whole draws by largest remainder, ties going to the earlier task. A task never has
    less than one draw, and what such tasks gain is added to the epoch.

    Under `group` > 1 the rows of a draw differ wherever the task has `group` rows. Tasks with fewer
    than 2 x group - 1 rows keep one order in all passes for that.

    Memory: two blocks, and 8 bytes for each block of an epoch.
    """

    quotas: tuple[int, ...]
    """Samples of each task in one epoch, a multiple of `group`."""
    epoch_size: int
    """Samples in one epoch."""
    fingerprint: str
    """Hash of all that the stream follows from; a run resumes only under the same one."""

    def __init__(self, shares: Sequence[Share], *, config: MixtureConfig, seed: int) -> None:
        self.shares = tuple(shares)
        self.config = config
        self.seed = seed
        _check_tasks(self.shares)
        capped = _capped_sizes(self.shares, config)
        self._draws = _whole_draws(
            _exact_shares(capped, config.temperature, _weights(self.shares, config)), config.group
        )
        sizes = capped if config.first_rows else [share.size for share in self.shares]
        self._sizes = np.array(sizes, dtype=np.int64)
        self.quotas = tuple((self._draws * config.group).tolist())
        self.epoch_size = sum(self.quotas)
        self.fingerprint = _fingerprint(self.shares, config, seed, self.quotas)
        self._row_keys = np.array(
            [_key("rows", seed, share.name) for share in self.shares], dtype=np.uint64
        )
        self._n_blocks = math.ceil(self.epoch_size / BLOCK)
        phases = _words(_key("phases", seed), np.arange(len(self.shares), dtype=np.uint64))
        self._phases = (phases % self._n_blocks).astype(np.int64)
        before = [int(self._draws_before(block).sum()) for block in range(self._n_blocks)]
        self._starts = np.array(before) * config.group
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_blocks": {}}

    def samples(self, start: int, stop: int) -> list[Sample]:
        """Return samples `start` to `stop - 1` of the stream; a range may cross epochs."""
        assert 0 <= start <= stop, (start, stop)
        samples: list[Sample] = []
        while start < stop:
            epoch, place = divmod(start, self.epoch_size)
            block = int(np.searchsorted(self._starts, place, side="right")) - 1
            tasks, rows = self._block(epoch * self._n_blocks + block)
            first = place - int(self._starts[block])
            last = min(first + stop - start, len(tasks))
            numbers = range(start, start + last - first)
            samples.extend(
                map(Sample, numbers, tasks[first:last].tolist(), rows[first:last].tolist())
            )
            start = numbers.stop
        return samples

    def _draws_before(self, block: int) -> NDArray[np.int64]:
        """Return how often each task was drawn before a block; blocks count through all epochs.

        Blocks get a task's draws at an even pace. The random phase makes up for rounding: without
        it, all tasks of one draw per epoch would be in the same block.
        """
        return (block * self._draws + self._phases) // self._n_blocks

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tasks and rows of a block."""
        content = self._blocks.pop(block, None) or self._make_block(block)
        self._blocks[block] = content
        while len(self._blocks) > BLOCKS_KEPT:
            self._blocks.pop(next(iter(self._blocks)))
        return content

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        before = self._draws_before(block)
        counts = self._draws_before(block + 1) - before
        numbers = np.arange(counts.sum())
        words = _words(_key("block", self.seed, block), numbers.astype(np.uint64))
        tasks = np.arange(len(counts)).repeat(counts)[words.argsort(kind="stable")]
        draws = np.empty_like(numbers)
        starts = counts.cumsum() - counts
        draws[tasks.argsort(kind="stable")] = numbers + (before - starts).repeat(counts)
        group = self.config.group
        visits = (draws[:, None] * group + np.arange(group)).ravel()
        tasks = tasks.repeat(group)
        return tasks, self._rows(tasks, visits)

    def _rows(self, tasks: NDArray[np.int64], visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each visit to a task."""
        group, sizes = self.config.group, self._sizes[tasks]
        passes, places = np.divmod(visits, sizes)
        passes[sizes < 2 * group - 1] = 0
        rows = self._shuffled(tasks, passes, places)
        heads = np.flatnonzero((passes * sizes % group > 0) & (places < group))
        if len(heads):
            rows[heads] = self._head_rows(tasks[heads], passes[heads], places[heads])
        return rows

    def _head_rows(
        self, tasks: NDArray[np.int64], passes: NDArray[np.int64], places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return rows at the first `group` places of passes that begin inside a draw.

        The draw took its first rows from the end of the pass before and takes the rest here. Its
        rows must differ, so rows it already has move behind them. Only the first `group` places
        change: the end of a pass is known without the passes before it.
        """
        group, n_tasks = self.config.group, len(self.shares)
        steps = np.arange(group)
        codes, lines = np.unique(passes * n_tasks + tasks, return_inverse=True)
        passes, tasks = np.divmod(codes[:, None], n_tasks)
        sizes = self._sizes[tasks]
        heads = self._shuffled(tasks, passes, steps)
        tails = self._shuffled(tasks, passes - 1, sizes - 1 - steps)
        lanes = np.arange(len(codes))[:, None] * self._sizes.max()
        taken = np.isin(heads + lanes, (tails + lanes)[steps < passes * sizes % group])
        heads = np.take_along_axis(heads, taken.argsort(axis=1, kind="stable"), axis=1)
        return heads[lines, places]

    def _shuffled(
        self, tasks: NDArray[np.int64], passes: NDArray[np.int64], places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the rows at places of passes; the three arrays broadcast."""
        tasks, passes, places = np.broadcast_arrays(tasks, passes, places)
        keys = _words(self._row_keys[tasks], passes.astype(np.uint64))
        sizes = self._sizes[tasks].astype(np.uint64)
        return _permuted(places.astype(np.uint64), sizes, keys).astype(np.int64)


def _check_tasks(shares: Sequence[Share]) -> None:
    """Raise `DataError` unless there are tasks, all with rows and with names of their own."""
    if not shares:
        raise DataError("a mixture needs at least one task; none was given")
    empty = [share.name for share in shares if share.size < 1]
    if empty:
        raise DataError(f"no rows in task(s) {_listed(empty)}; remove them or give them rows")
    names = Counter(share.name for share in shares)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise DataError(f"more than one task is called {_listed(twice)}; rename all but one")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def _capped_sizes(shares: Sequence[Share], config: MixtureConfig) -> list[int]:
    """Return min(size, cap) per task; a task's own cap is stronger than the mixture's."""
    sizes = []
    for share in shares:
        cap = config.cap if share.cap is None else share.cap
        if cap is not None and cap < 1:
            raise ConfigError(f"task {share.name}: cap {cap} is not at least 1")
        sizes.append(share.size if cap is None else min(share.size, cap))
    return sizes


def _weights(shares: Sequence[Share], config: MixtureConfig) -> list[float | None]:
    """Return the fixed weight of each task, if any; the mixture's is stronger than the task's."""
    names = [share.name for share in shares]
    for name in sorted(set(config.weights) - set(names)):
        raise ConfigError(f"mixture.weights: no task is called '{name}'{suggest(name, names)}")
    weights = [config.weights.get(share.name, share.weight) for share in shares]
    for name, weight in zip(names, weights):
        if weight is not None and not 0.0 < weight < math.inf:
            raise ConfigError(
                f"task {name}: weight {weight} is not a number above 0; "
                "to leave a task out, remove it from the tasks"
            )
    return weights


def _exact_shares(
    sizes: Sequence[int], temperature: float, weights: Sequence[float | None]
) -> NDArray[np.float64]:
    """Return the exact share of each task in samples per epoch."""
    shares = np.array(sizes, dtype=np.float64)
    total = shares.sum()
    if temperature != 1.0:
        shares = (shares / shares.max()) ** (1.0 / temperature)
        shares *= total / shares.sum()
    for task, weight in enumerate(weights):
        if weight is not None:
            shares[task] = weight * total / len(shares)
    return shares


def _whole_draws(shares: NDArray[np.float64], group: int) -> NDArray[np.int64]:
    """Round shares to whole draws by largest remainder, with at least one draw each."""
    if shares.sum() / group > MOST_DRAWS:
        raise ConfigError(f"mixture: an epoch of {shares.sum():.3g} samples; lower weights or caps")
    exact = shares / group
    draws = np.maximum(np.floor(exact), 1.0)
    short = round(exact.sum() - draws.sum())
    if short > 0:
        draws[np.argsort(draws - exact, kind="stable")[:short]] += 1.0
    return draws.astype(np.int64)


def _fingerprint(
    shares: Sequence[Share], config: MixtureConfig, seed: int, quotas: Sequence[int]
) -> str:
    """Hash everything the stream follows from; 1 and 1.0 count as the same number."""
    content = {
        "format": FORMAT,
        "shares": [asdict(share) for share in shares],
        "config": asdict(config),
        "seed": seed,
        "quotas": quotas,
    }
    return sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return JSON-like content with every whole float as an integer."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _key(*parts: str | int) -> np.uint64:
    return np.uint64(int.from_bytes(sha256(json.dumps(parts).encode()).digest()[:8], "little"))


def _words(keys: NDArray[np.uint64] | np.uint64, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return words `numbers` of the SplitMix64 streams that start from `keys`."""
    words: NDArray[np.uint64] = keys + (numbers + 1) * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> 30
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> 27
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> 31
    return words


def _permuted(
    places: NDArray[np.uint64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Return where each place below `size` goes in the permutation of range(size) under its key.

    A Feistel network: the two digits of a place, to bases of about sqrt(size), take turns at moving
    on by a random number that depends on the other digit. The digits span a little more than
    `size`; what ends there goes through again until it is back. Under two odd bases, one order out
    of two could not come.
    """
    bases = 2 * np.ceil(np.sqrt(sizes) / 2).astype(np.uint64)
    others = (sizes + bases - 1) // bases
    high, low = np.divmod(places, others)
    for number in range(0, ROUNDS, 2):
        high = (high + (_words(keys, low * ROUNDS + number) >> 32)) % bases
        low = (low + (_words(keys, high * ROUNDS + number + 1) >> 32)) % others
    images = high * others + low
    outside = images >= sizes
    if outside.any():
        images[outside] = _permuted(images[outside], sizes[outside], keys[outside])
    return images
