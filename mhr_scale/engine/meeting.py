"""The ranks of a launch find each other: through a store that rank 0 keeps, or torchrun's agent."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from mhr_scale.errors import EngineError, first_line, some
from mhr_scale.run.runlog import log

#: How often the log says what is waited for.
REMIND_SECONDS = 30.0
LOOK_SECONDS = 0.1


def gather_store(rank: int, world_size: int, *, timeout: timedelta) -> dist.Store:
    """The store of this launch, once every rank has come to it. Collective.

    Raises `EngineError` if its machine is unknown or does not answer, or naming the ranks that have
    not come within `timeout`.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"{address}:{port}"
    _look_up(address, port)
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_kept_here = rank == 0 and not is_agents
    end = time.monotonic() + timeout.total_seconds()
    if not is_kept_here:
        answers = _wait(lambda: _is_answered(address, port), lambda: f"rank 0 at {place}", end=end)
        if not answers:
            raise EngineError(
                f"rank 0 does not answer at {place} within run.timeout_seconds; is it started, on "
                "that machine and with that MASTER_PORT, and does no firewall stand between?"
            )
    store: dist.Store = dist.TCPStore(
        address,
        port,
        world_size,
        is_kept_here,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0":  # torchrun's store may still have addresses of ranks that died
        store = dist.PrefixStore(f"attempt {attempt}", store)
    store.set(_key(rank), "here")

    def missing() -> str:
        ranks = [str(rank) for rank in range(world_size) if not store.check([_key(rank)])]
        return f"rank(s) {some(ranks)} of {world_size}"

    keys = [_key(rank) for rank in range(world_size)]
    if not _wait(lambda: store.check(keys), lambda: f"{missing()} at {place}", end=end):
        raise EngineError(
            f"{missing()} did not come to {place} within run.timeout_seconds; are they started, "
            "with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and what do their last lines "
            "say?"
        )
    return store


def _look_up(address: str, port: int) -> None:
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise EngineError(
            f"MASTER_ADDR={address}: no such machine ({first_line(error)}); it is the name or the "
            "address of rank 0's machine, seen from this one"
        ) from error


def _is_answered(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=1.0):
        return True
    return False


def _wait(is_there: Callable[[], bool], what: Callable[[], str], *, end: float) -> bool:
    """Wait until something is there, saying now and then what is missing; False at the end."""
    remind = time.monotonic() + REMIND_SECONDS
    while not is_there():
        now = time.monotonic()
        if now > end:
            return False
        if now > remind:
            log.warning("still waiting for %s", what())
            remind = now + REMIND_SECONDS
        time.sleep(LOOK_SECONDS)
    return True


def _key(rank: int) -> str:
    return f"mhr_scale/rank {rank}"
