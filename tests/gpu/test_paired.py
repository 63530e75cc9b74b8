"""Ways that take turns: what fails leaves, ratios are of a turn, goals are held."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from board import Board, Found, Scale
from card_models import MHR_8, T0_11B, Backbones
from paired import Timed, found_of, take_turns, with_goal
from torch import nn

TINY = Scale.tiny()


def way(name: str, step: Any) -> Any:
    return SimpleNamespace(name=name, model=nn.Linear(4, 4), step=step)


def test_what_fails_leaves_the_turns_and_is_an_entry(tmp_path: Any) -> None:
    steps: list[str] = []

    def too_much() -> None:
        steps.append("b")
        raise torch.OutOfMemoryError("CUDA out of memory")

    ways = [way("a", lambda: steps.append("a")), way("b", too_much)]
    found = take_turns(ways, TINY)
    assert steps == ["a", "b", "a"]
    assert "CUDA out of memory" in found["b"].error
    entries = found_of(found, bases=("b",), flops=1.0, tokens=1, rate=1.0)
    board = Board(tmp_path, TINY)
    board.run_together(["a", "b"], lambda: entries)
    assert board.entries["", "a"].values["x b"] is None
    assert board.entries["", "b"].result == "error"
    board.run_together(["a", "b"], lambda: {"a": Found({}), "b": Found({"ms": 1.0})})
    assert board.entries["", "b"].values == {"ms": 1.0}


def test_ratios_are_medians_of_those_within_a_turn() -> None:
    slow, base = Timed(seconds=[2.0, 30.0, 4.0]), Timed(seconds=[1.0, 10.0, 4.0])
    assert slow.over(base) == 2.0


def test_a_goal_is_held_beside_what_held_before() -> None:
    full = Scale(is_tiny=False, device=torch.device("cpu"))
    entries: dict[str, Found | str] = {"a": Found({"ms": 2.0, "share": 0.5}, True, "right")}
    with_goal(entries, "a", {"ms": ("<=", 2.0), "share": (">=", 0.4)}, full)
    assert entries["a"] == Found({"ms": 2.0, "share": 0.5}, True, "right, ms <= 2, share >= 0.4")
    with_goal(entries, "a", {"share": (">=", 0.6)}, full)
    assert isinstance(entries["a"], Found)
    assert entries["a"].holds is False
    with_goal(entries, "missing", {"share": (">=", 0.6)}, full)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_all_modules_have_the_weights_that_were_made_once() -> None:
    backbones = Backbones(T0_11B, TINY)
    stock = {p.data_ptr() for p in backbones.stock.parameters()}
    placed = backbones.place(MHR_8, recompute="reentrant")
    assert {p.data_ptr() for p in placed.model.parameters()} == stock
    assert all(p.abs().sum() > 0 for p in placed.model.parameters())
