"""Ranks with other jobs pass through a sharded backbone together: ranks are threads here."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhr_scale.jobs.lockstep import KINDS, Lockstep
from mhr_scale.run import stopping

scripts = st.lists(st.sampled_from(KINDS), max_size=6)


class Ranks:
    """A sum over threads, in place of a process group."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.collectives = 0
        self._barrier = threading.Barrier(count, timeout=20)
        self._given: list[torch.Tensor | None] = [None] * count

    def engine(self, rank: int) -> "RankEngine":
        return RankEngine(self, rank)

    def sum(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self._given[rank] = tensor.clone()
        if self._barrier.wait() == 0:
            self.collectives += 1
        total = torch.stack(self._given).sum(0)
        self._barrier.wait()
        return tensor.copy_(total)


class RankEngine:
    """What a lockstep reads of an engine."""

    is_sharded = True
    device = torch.device("cpu")

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.world_size = ranks.count
        self.reduce_sum = lambda tensor: ranks.sum(rank, tensor)


class Walk:
    """One rank on its way: the passes it ran, its own and those for company, in order."""

    def __init__(self, engine: RankEngine) -> None:
        self.ran: list[tuple[str, bool]] = []
        self.lockstep = Lockstep(engine, lambda kind: self.ran.append((kind, False)))

    def run(self, script: list[str]) -> None:
        for kind in script:
            self.lockstep.turn(kind)
            self.ran.append((kind, True))
        self.lockstep.finish()


def walk(*given: list[str]) -> tuple[list[Walk], int]:
    """Run every rank's script in a thread of its own, to the end; and the collectives it took."""
    ranks = Ranks(len(given))
    walks = [Walk(ranks.engine(rank)) for rank in range(len(given))]
    threads = [
        threading.Thread(target=one.run, args=(script,), daemon=True)
        for one, script in zip(walks, given, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return walks, ranks.collectives


@settings(max_examples=60, deadline=None)
@given(st.lists(scripts, min_size=2, max_size=4))
def test_all_ranks_run_the_same_kinds_of_passes_whatever_they_have_to_do(given):
    walks, collectives = walk(*given)
    kinds = [[kind for kind, _ in one.ran] for one in walks]
    assert all(found == kinds[0] for found in kinds)
    assert collectives == len(kinds[0]) + 1  # the last one agrees that all are done
    for one, script in zip(walks, given, strict=True):
        assert [kind for kind, own in one.ran if own] == script


@settings(max_examples=30, deadline=None)
@given(st.lists(scripts, min_size=2, max_size=4))
def test_no_pass_runs_for_company_alone(given):
    walks, _ = walk(*given)
    for turn in zip(*(one.ran for one in walks), strict=True):
        assert any(own for _, own in turn)


def test_training_goes_first_so_that_ranks_meet_at_their_evaluations():
    walks, _ = walk(["train", "rank", "train"], ["train", "train", "rank"])
    assert [kind for kind, _ in walks[0].ran] == ["train", "train", "rank", "train"]
    assert walks[0].ran[1] == ("train", False)
    assert [own for _, own in walks[1].ran] == [True, True, True, False]


def test_a_rank_without_jobs_keeps_the_others_company_to_the_end():
    (_, idle), _ = walk(["train"] * 3 + ["generate"] * 2, [])
    assert idle.ran == [("train", False)] * 3 + [("generate", False)] * 2


def test_ranks_without_jobs_agree_at_once():
    walks, collectives = walk([], [])
    assert [one.ran for one in walks] == [[], []]
    assert collectives == 1


class Apart:
    """An engine that must not be asked to sum anything."""

    device = torch.device("cpu")

    def __init__(self, *, is_sharded: bool, world_size: int) -> None:
        self.is_sharded, self.world_size = is_sharded, world_size

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a collective")


@pytest.mark.parametrize(("is_sharded", "world_size"), [(False, 1), (False, 4), (True, 1)], ids=str)
def test_ranks_that_are_independent_take_turns_at_no_cost(is_sharded, world_size):
    one = Walk(Apart(is_sharded=is_sharded, world_size=world_size))
    one.run(["train", "rank", "generate", "train"])
    assert [kind for kind, own in one.ran if own] == ["train", "rank", "generate", "train"]
    assert len(one.ran) == 4


def test_a_rank_that_is_asked_to_stop_stops_all_of_them_in_the_same_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of them is asked before its first pass: none of them runs any."""
    ranks, ended = Ranks(2), {}
    monkeypatch.setattr(stopping, "is_asked", lambda: threading.current_thread().name == "asked")

    def run(walk: Walk, script: list[str]) -> None:
        try:
            walk.run(script[:2])
        except stopping.Stopped:
            ended[script[-1]] = list(walk.ran)

    walks = [Walk(ranks.engine(rank)) for rank in range(2)]
    threads = [
        threading.Thread(target=run, args=(walks[0], ["train", "rank", "free"]), daemon=True),
        threading.Thread(
            target=run, args=(walks[1], ["generate", "train", "asked"]), name="asked", daemon=True
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert ended == {"free": [], "asked": []}


def test_an_independent_rank_stops_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "is_asked", lambda: True)
    engine = RankEngine(Ranks(1), 0)
    with pytest.raises(stopping.Stopped, match="the jobs of this rank are saved"):
        Lockstep(engine, {}).turn("train")
