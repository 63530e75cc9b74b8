"""Meeting the other ranks of a launch at its port, and no rank of another one.

Ranks of two launches with the same port would otherwise form one group and train one another's
batches. Rank 0 publishes what its launch is; the others compare it with what theirs is.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mhr_scale.errors import EngineError, first_line, some
from mhr_scale.run import stopping
from mhr_scale.run.ownership import boot_id
from mhr_scale.run.repositories import commits
from mhr_scale.run.runlog import log, versions_of

#: Where several launches share a port: how each gets its own.
WAY_OUT = (
    "give every launch a port of its own (deepspeed --master_port, torchrun --rdzv-endpoint), and "
    "all machines the same recipe and versions"
)
#: Identifiers that schedulers and launchers give all processes of a launch.
JOB_IDS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "PBS_JOBID", "LSB_JOBID")
PACKAGES = ("torch", "deepspeed", "transformers")
LAUNCH, ARRIVED = "mhr_scale/launch", "mhr_scale/arrived"
#: How often the log says whom a rank waits for.
REMIND_SECONDS = 30.0
LOOK_SECONDS = 0.1


def meet(recipe: str, *, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store that the ranks of this launch share, once all are there and known to be of one
    launch. Collective.

    Raises `EngineError` if rank 0's machine is unknown or its port taken, if another launch answers
    there, or if ranks have not arrived in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place, end = f"{address}:{port}", time.monotonic() + timeout.total_seconds()
    store = _open_store(address, port, rank, world_size, end=end, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0":  # torchrun's store may still have addresses of ranks that died
        store = dist.PrefixStore(f"attempt {attempt}", store)
    own = describe_launch(recipe, world_size)
    if rank == 0:
        store.set(LAUNCH, json.dumps(own))
    elif _wait(lambda: store.check([LAUNCH]), lambda: f"rank 0 at {place}", end=end):
        _compare(json.loads(store.get(LAUNCH)), own, place)
    store.set(_key(rank), "")
    _wait_for_all(store, world_size, place, end=end)
    return store


def _open_store(
    address: str, port: int, rank: int, world_size: int, *, end: float, timeout: timedelta
) -> dist.Store:
    """The store that rank 0 keeps, or torchrun's agent, where there is one."""
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise EngineError(
            f"MASTER_ADDR={address}: no such machine ({first_line(error)}); it is the name or the "
            "address of rank 0's machine, seen from this one"
        ) from error
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_kept_here, place = rank == 0 and not is_agents, f"{address}:{port}"
    if not is_kept_here and not _wait(
        lambda: _is_answered(address, port), lambda: f"rank 0 at {place}", end=end
    ):
        raise EngineError(
            f"rank 0 does not answer at {place} within run.timeout_seconds; is it started, on that "
            "machine and with that MASTER_PORT, and does no firewall stand between?"
        )
    try:
        return dist.TCPStore(
            address,
            port,
            world_size,
            is_kept_here,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            raise EngineError(
                f"port {port} of this machine is in use, by another launch or another program; "
                f"{WAY_OUT}"
            ) from error
        raise


def _is_answered(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=1.0):
        return True
    return False


def describe_launch(recipe: str, world_size: int) -> dict[str, str]:
    """What all ranks of one launch have in common, by name.

    Launchers are compared between ranks of one machine alone.
    """
    facts = {
        "recipe": hashlib.sha256(recipe.encode()).hexdigest()[:16],
        "code": _hash_code(),
        "world size": str(world_size),
        **versions_of(PACKAGES),
        **commits(),  # a revision may have moved between the looks of two ranks
    }
    facts |= {name: os.environ[name] for name in JOB_IDS if name in os.environ}
    launchers = stopping.find_launchers()
    if launchers:
        first = launchers[0]
        facts[f"launcher on {boot_id()}"] = f"process {first.pid} of {first.create_time():.2f}"
    return facts


def _hash_code() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compare(theirs: Mapping[str, str], own: Mapping[str, str], address: str) -> None:
    """Raise `EngineError` if rank 0's launch is another one than this rank's."""
    differing = [
        f"{name} is {theirs[name]} there, {own[name]} here"
        for name in own
        if name in theirs and theirs[name] != own[name]
    ]
    if differing:
        raise EngineError(
            f"the rank 0 that answers at {address} is of another launch ({some(differing, shown=3)}"
            f"); {WAY_OUT}"
        )


def _wait_for_all(store: dist.Store, world_size: int, place: str, *, end: float) -> None:
    """Wait for all ranks to arrive; raises `EngineError` naming those that have not."""

    def missing() -> str:
        ranks = [str(rank) for rank in range(world_size) if not store.check([_key(rank)])]
        return f"rank {some(ranks)} of {world_size}"

    keys = [_key(rank) for rank in range(world_size)]
    if not _wait(lambda: store.check(keys), lambda: f"{missing()} at {place}", end=end):
        raise EngineError(
            f"{missing()} did not come to {place} within run.timeout_seconds; are they started, "
            "with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and what do their last lines "
            "say?"
        )


def _key(rank: int) -> str:
    return f"{ARRIVED}/{rank}"


def _wait(is_there: Callable[[], bool], what: Callable[[], str], *, end: float) -> bool:
    """Wait until something is there, saying now and then what is missing; False at the end.

    Looking again and again lets signals through, which one long look would not.
    """
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
