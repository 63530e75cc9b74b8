"""The order in which a run sees the rows of its tasks.

A `MixturePlan` maps a sample number to a row of a task. The stream is a pure function of the plan,
its seed and that number: nothing is consumed, any range can be asked for in any order, and a run
resumes from one integer on any number of ranks or workers.

The stream is a chain of epochs. An epoch is one shuffle of draws, a draw being `group` consecutive
samples of one task; each task has the same number of draws in every epoch. A task's visits are
counted through all epochs, and its rows are walked in passes, each a new shuffle of all its rows: a
capped task goes on through its own rows epoch by epoch, and no row of it comes twice before every
row came once.

Shuffles sort raw Philox words, which NumPy keeps stable across its releases; the streams of its
`Generator` methods are not.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhr_scale.config import MixtureConfig
from mhr_scale.errors import ConfigError, DataError, did_you_mean

__all__ = ["MixturePlan", "Sample", "Share"]

FORMAT = 1
"""Number of the rules in this file; raise it whenever a plan starts to give another stream."""

EPOCHS_KEPT = 2
"""Epochs held in memory: a range that crosses from one to the next needs both."""

MOST_DRAWS = 2**31
"""Limit of the draws of an epoch, which have 32-bit numbers."""


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

    Memory: 4 bytes per draw of each kept epoch and 4 bytes per row of each task that was visited.
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
        self._starts = np.cumsum(self._draws) - self._draws
        self._epochs: dict[int, NDArray[np.uint32]] = {}
        self._orders: dict[int, tuple[int, NDArray[np.uint32]]] = {}
        self.quotas = tuple((self._draws * config.group).tolist())
        self.epoch_size = sum(self.quotas)
        self.fingerprint = _fingerprint(self.shares, config, seed, self.quotas)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epochs": {}, "_orders": {}}

    def samples(self, start: int, stop: int) -> list[Sample]:
        """Return samples `start` to `stop - 1` of the stream; a range may cross epochs."""
        assert 0 <= start <= stop, (start, stop)
        found: list[Sample] = []
        while start < stop:
            epoch, first = divmod(start, self.epoch_size)
            last = min(first + stop - start, self.epoch_size)
            tasks, rows = self._look_up(epoch, first, last)
            found.extend(map(Sample, range(start, stop), tasks.tolist(), rows.tolist()))
            start += last - first
        return found

    def _look_up(
        self, epoch: int, first: int, last: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Return tasks and rows of positions `first` to `last - 1` of an epoch."""
        group = self.config.group
        positions, steps = np.divmod(np.arange(first, last), group)
        draws = self._epoch(epoch)[positions]
        tasks = np.searchsorted(self._starts, draws, side="right") - 1
        visits = (epoch * self._draws[tasks] + draws - self._starts[tasks]) * group + steps
        passes, places = np.divmod(visits, self._sizes[tasks])
        rows = np.empty(len(tasks), dtype=np.uint32)
        by_pass = np.lexsort((passes, tasks))
        changes = np.diff(tasks[by_pass]) | np.diff(passes[by_pass])
        for chosen in np.split(by_pass, np.flatnonzero(changes) + 1):
            order = self._order(int(tasks[chosen[0]]), int(passes[chosen[0]]))
            rows[chosen] = order[places[chosen]]
        return tasks, rows

    def _epoch(self, epoch: int) -> NDArray[np.uint32]:
        """Return the draws of an epoch in the order of the stream.

        Draw `starts[t] + j` is the j-th draw of task t: draws of one task keep their order, which
        is what lets a visit be counted without a look at the rest of the epoch.
        """
        draws = self._epochs.pop(epoch, None)
        if draws is None:
            n_tasks = len(self.shares)
            labels = np.arange(n_tasks, dtype=np.min_scalar_type(n_tasks - 1)).repeat(self._draws)
            labels = _shuffled(labels, _key("epoch", self.seed, epoch))
            draws = np.empty(len(labels), dtype=np.uint32)
            draws[labels.argsort(kind="stable")] = np.arange(len(labels), dtype=np.uint32)
        self._epochs[epoch] = draws
        while len(self._epochs) > EPOCHS_KEPT:
            self._epochs.pop(next(iter(self._epochs)))
        return draws

    def _order(self, task: int, number: int) -> NDArray[np.uint32]:
        """Return the order of a task's rows in its pass `number`."""
        kept, order = self._orders.get(task, (-1, None))
        if order is None or kept != number:
            order = self._make_order(task, number)
            self._orders[task] = (number, order)
        return order

    def _make_order(self, task: int, number: int) -> NDArray[np.uint32]:
        size, group = int(self._sizes[task]), self.config.group
        if size < 2 * group - 1:
            return self._shuffled_rows(task, 0)
        order = self._shuffled_rows(task, number)
        begun = number * size % group
        if begun:
            # A draw took its first `begun` rows from the end of the pass before and takes the rest
            # here. Its rows must differ, so rows it already has move behind it. Only the first
            # `group` places change: the end of a pass is known without the passes before it.
            head = order[:group]
            taken = np.isin(head, self._shuffled_rows(task, number - 1)[-begun:])
            order[:group] = np.concatenate([head[~taken], head[taken]])
        return order

    def _shuffled_rows(self, task: int, number: int) -> NDArray[np.uint32]:
        rows = np.arange(self._sizes[task], dtype=np.uint32)
        return _shuffled(rows, _key("rows", self.seed, self.shares[task].name, number))


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
        raise ConfigError(f"mixture.weights: no task is called '{name}'{did_you_mean(name, names)}")
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


def _key(*parts: str | int) -> int:
    """Return the 128-bit Philox key of a shuffle."""
    return int.from_bytes(sha256(json.dumps(parts).encode()).digest()[:16], "little")


def _shuffled(values: NDArray[Any], key: int) -> NDArray[Any]:
    """Return non-negative integers in random order.

    Every value goes below random bits in a 64-bit word and the words are sorted: 40 random bits are
    left at 16 million distinct values, which makes the order of a tie irrelevant.
    """
    bits = int(values.max()).bit_length()
    words = np.random.Philox(key=key).random_raw(len(values))
    words <<= np.uint64(bits)
    words |= values
    words.sort()
    words &= np.uint64((1 << bits) - 1)
    return words.astype(values.dtype)
