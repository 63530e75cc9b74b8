"""Meeting the other ranks of a launch at its port, and no rank of another one.

Ranks of two launches with the same port would otherwise form one group and train one another's
batches. Rank 0 publishes what its launch is; the others compare it with what theirs is.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch.distributed as dist

from mhr_scale.errors import EngineError, some
from mhr_scale.run import stopping
from mhr_scale.run.ownership import boot_id

#: Where several launches share a port: how each gets its own.
WAY_OUT = (
    "give every launch a port of its own (deepspeed --master_port, torchrun --rdzv-endpoint), and "
    "all machines the same recipe and versions"
)
#: Identifiers that schedulers and launchers give all processes of a launch.
JOB_IDS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "PBS_JOBID", "LSB_JOBID")
PACKAGES = ("torch", "deepspeed", "transformers")
LAUNCH, ARRIVED = "mhr_scale/launch", "mhr_scale/arrived"


def meet(recipe: str, *, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store that the ranks of this launch share, once they are known to be of one launch.

    Raises `EngineError` if the port is taken, if another launch answers at it, or if ranks have not
    arrived in time.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    except RuntimeError as error:
        if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
            raise EngineError(
                f"port {os.environ.get('MASTER_PORT')} of this machine is in use, by another "
                f"launch or another program; {WAY_OUT}"
            ) from error
        raise
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0":  # torchrun's store may still have addresses of ranks that died
        store = dist.PrefixStore(f"attempt {attempt}", store)
    own = describe_launch(recipe, world_size)
    if rank:
        _compare(json.loads(store.get(LAUNCH)), own, address)
        store.set(f"{ARRIVED}/{rank}", "")
        return store
    store.set(LAUNCH, json.dumps(own))
    _wait_for(store, range(1, world_size), timeout)
    return store


def describe_launch(recipe: str, world_size: int) -> dict[str, str]:
    """What all ranks of one launch have in common, by name.

    Launchers are compared between ranks of one machine alone.
    """
    facts = {
        "recipe": hashlib.sha256(recipe.encode()).hexdigest()[:16],
        "code": _hash_code(),
        "world size": str(world_size),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
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


def _wait_for(store: dist.Store, ranks: range, timeout: timedelta) -> None:
    """Wait for the other ranks to arrive; raises `EngineError` naming those that have not."""
    keys = {rank: f"{ARRIVED}/{rank}" for rank in ranks}
    if not keys:
        return
    try:
        store.wait(list(keys.values()), timeout)
    except RuntimeError as error:
        missing = [str(rank) for rank, key in keys.items() if not store.check([key])]
        raise EngineError(
            f"waited {timeout.total_seconds():g} s for {len(missing)} of {len(keys) + 1} ranks "
            f"(rank {some(missing)}), which have not come; look at their last lines, or raise "
            "run.timeout_seconds"
        ) from error
