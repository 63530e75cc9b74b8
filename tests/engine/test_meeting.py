"""How the ranks of a launch find each other, and what they say if they do not."""

import logging
import socket
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import free_port

from mhr_scale.engine import meeting
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import EngineError

SHORT, LONG = timedelta(seconds=0.5), timedelta(seconds=60)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> str:
    number = str(free_port())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", number)
    monkeypatch.setattr(meeting, "LOOK_SECONDS", 0.01)
    return number


def meet(rank: int, world_size: int, timeout: timedelta, recipe: str = "") -> dist.Store:
    return meeting.meet(recipe, rank=rank, world_size=world_size, timeout=timeout)


def test_ranks_that_come_in_any_order_share_a_store(port: str) -> None:
    stores = {}

    def come(rank: int) -> None:
        stores[rank] = meet(rank, 3, LONG)

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    stores[1].set("word", "said")
    assert stores[2].get("word") == b"said"


def test_ranks_that_never_come_are_named(port: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(meeting, "REMIND_SECONDS", 0.0)
    with (
        caplog.at_level(logging.WARNING, logger="mhr_scale"),
        pytest.raises(EngineError, match=r"rank 1, 2 of 3 did not come to 127.0.0.1:"),
    ):
        meet(0, 3, SHORT)
    assert "still waiting for rank 1, 2 of 3 at 127.0.0.1:" in caplog.messages[0]


def test_a_first_rank_that_never_comes_is_named_with_its_place(port: str) -> None:
    with pytest.raises(EngineError, match=f"rank 0 does not answer at 127.0.0.1:{port} within"):
        meet(1, 2, SHORT)


def test_an_unknown_machine_is_named_at_once(port: str, monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no such machine.invalid")
    with pytest.raises(EngineError, match=r"MASTER_ADDR=no such machine\.invalid: no such"):
        meet(0, 2, LONG)


def test_a_rank_of_another_launch_is_sent_away(port: str) -> None:
    def come() -> None:
        with suppress(EngineError):
            meet(0, 2, timedelta(seconds=3))

    first = threading.Thread(target=come)
    first.start()
    with pytest.raises(EngineError, match=r"is of another launch \(recipe is"):
        meet(1, 2, LONG, recipe="another")
    first.join(60)


def test_a_port_in_use_is_named(port: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(port)))
        other.listen()
        with pytest.raises(EngineError, match=f"port {port} of this machine is in use"):
            meet(0, 2, SHORT)


@pytest.mark.parametrize(
    ("n_gpus", "variables", "message"),
    [
        (0, {"DS_ACCELERATOR": "cuda"}, "torch finds no GPU here; set it to cpu"),
        (2, {"LOCAL_RANK": "2"}, r"LOCAL_RANK=2, but this machine has 2 GPU\(s\)"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_says_so(n_gpus, variables, message, monkeypatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=message):
        Engine({}, timeout_seconds=1.0)
