"""Processes, placement of the backbone, and the one collective of a step.

DeepSpeed manages the frozen weights (ZeRO-3 sharding, gathering, offload); it never sees an adapter
parameter, so it cannot partition, cast or reduce one.
"""

import os
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhr_scale.adapters.linear import UNITS
from mhr_scale.backbone import quantise
from mhr_scale.backbone.blueprint import Blueprint, make_model, tie
from mhr_scale.config import BackboneConfig
from mhr_scale.engine import nvme
from mhr_scale.engine.compiling import load_operation
from mhr_scale.engine.ds_config import deepspeed_config, import_deepspeed, is_sharded
from mhr_scale.engine.filling import fill, map_weights
from mhr_scale.engine.gradients import order_gradients, require_input_gradients
from mhr_scale.engine.heartbeat import Heartbeat, watch_of
from mhr_scale.engine.host_memory import give_back_freed_blocks
from mhr_scale.engine.meeting import meet
from mhr_scale.engine.prefetching import read_blocks_ahead
from mhr_scale.errors import EngineError
from mhr_scale.families.family import Family
from mhr_scale.families.modes import set_dropout, set_recompute
from mhr_scale.run import stopping
from mhr_scale.run.runlog import rank, ranks_here, world_size


class Engine:
    """One process of a run: its rank, its device, and the backbone in its placement."""

    def __init__(
        self,
        ds_content: dict[str, Any],
        *,
        timeout_seconds: float,
        device: torch.device | None = None,
        recipe: str = "",
    ) -> None:
        """Take this rank's GPU, or the CPU, and join the ranks that the launcher started.

        They must have the same `recipe`: with another one they are of another launch.
        With a `device` the process runs alone on it, whatever the launcher's environment says; on
        the meta device weights have no memory and are never filled.
        """
        is_alone = device is not None
        self.rank = 0 if is_alone else rank()
        self.world_size = 1 if is_alone else world_size()
        self.is_sharded = is_sharded(ds_content)
        assert not (is_alone and self.is_sharded), "shards need their group of ranks"
        self.timeout = timedelta(seconds=timeout_seconds)
        self._ds_content = ds_content
        self._runtime: Any = None
        self._sequence: _ModuleSequence | None = None
        self._patient: Any = None
        self._heartbeat: Heartbeat | None = None
        self.device = torch.device("cpu") if device is None else device
        if device is not None:
            return
        on_gpu = _is_on_gpu()
        if not on_gpu and self.world_size > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here()))
        if on_gpu:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if (self.world_size > 1 or self.is_sharded) and not dist.is_initialized():
            self._join(recipe)

    @property
    def placement(self) -> str:
        """`replicated` or `zero3`."""
        return "zero3" if self.is_sharded else "replicated"

    def _join(self, recipe: str) -> None:
        """Join the process group, with a timeout and without the compiled collective on CPU."""
        deepspeed = import_deepspeed()
        is_on_gpu = self.device.type == "cuda"
        backend = "nccl" if is_on_gpu else "gloo"
        store: dist.Store = dist.HashStore()
        if self.world_size > 1:
            n_ranks = self.world_size
            store = meet(recipe, rank=self.rank, world_size=n_ranks, timeout=self.timeout)
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)  # DeepSpeed looks there
        dist.init_process_group(
            backend,
            timeout=self.timeout,
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            device_id=self.device if is_on_gpu else None,  # barriers know theirs, too
        )
        if self.world_size > 1:
            self._heartbeat = Heartbeat(
                store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=self.timeout,
                is_stuck=watch_of(self.device, self.timeout),
            )
        deepspeed.init_distributed(dist_backend=backend, timeout=self.timeout, verbose=False)

    # -- backbone ------------------------------------------------------------------------------

    def build(self, config: BackboneConfig, blueprint: Blueprint) -> nn.Module:
        """Build and fill the frozen backbone in its placement.

        Sharded from construction: under ZeRO-3 each rank reads and holds its own flat range of
        each tensor only. Replicated on a CPU, weights are used where their files are mapped.
        """
        kind = quantise.kind_of(config, blueprint)
        mapped = config.mapped and self.device.type == "cpu" and not self.is_sharded
        if self.is_sharded:
            assert kind == "none", "quantise.check comes first"
            deepspeed = import_deepspeed()
            op = deepspeed.ops.op_builder.AsyncIOBuilder()
            if nvme.check(self._ds_content, blueprint, n_ranks=self.world_size, op=op):
                load_operation(op)
            if self.device.type == "cpu":
                give_back_freed_blocks()
            ds_config = deepspeed_config(self._ds_content, dtype=config.dtype)
            with deepspeed.zero.Init(config_dict_or_path=ds_config):
                model = make_model(blueprint)
        else:
            with torch.device("meta"):
                model = make_model(blueprint).to(getattr(torch, config.dtype))
            if mapped:
                map_weights(model, blueprint, kind=kind)
                tie(model, blueprint)
            quantise.allocate(model, blueprint, kind, self.device)
            tie(model, blueprint)
            model.requires_grad_(False)
        if self.device.type != "meta":
            blueprint.family.fill_buffers(model, blueprint.model_config)
            rank = self.rank if self.is_sharded else None
            fill(model, blueprint, kind=kind, mapped=mapped, rank=rank, device=self.device)
        if mapped:
            read_blocks_ahead(model, blueprint.family)
        blueprint.family.fuse(model, config)
        set_dropout(model, config.dropout)
        set_recompute(model, config.recompute)
        return model

    def prepare(
        self,
        model: nn.Module,
        family: Family,
        config: BackboneConfig,
        *,
        always_backward: bool = False,
    ) -> nn.Module:
        """Install the runtime that gathers sharded weights; the linears must be wrapped already.

        Collective. Returns the module to call. A replicated model only gets hooks that sum
        gradients in the order of a sharded one, where siblings gather their weights together.
        `always_backward` makes every backward pass run through every sharded module, whichever of
        them are adapted, so that ranks with different adapters stay in step.
        """
        if not self.is_sharded:
            order_gradients(model, family)
            return model
        if always_backward:
            require_input_gradients(model, family)
        deepspeed = import_deepspeed()
        for part in model.modules():
            if isinstance(part, UNITS):
                deepspeed.utils.set_z3_leaf_module(part, True)
        ds_config = deepspeed_config(self._ds_content, dtype=config.dtype)
        self._runtime, *_ = deepspeed.initialize(model=model, config=ds_config)
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(self.timeout, group)
        module: nn.Module = self._runtime.module
        if self.world_size > 1:
            self._sequence = _ModuleSequence(module)
        return module

    @property
    def facts(self) -> dict[str, Any]:
        """Ranks, device and placement, for the provenance of a run."""
        return {
            "world_size": self.world_size,
            "device": str(self.device),
            "placement": self.placement,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def after_backward(self) -> None:
        """Release gathered weights that no backward hook released. Call after each backward pass.

        A block whose input needs no gradient never runs its hook: its weights would stay gathered.
        """
        if self._runtime is not None:
            self._runtime.optimizer.release_backward_leftovers()

    def check_same_modules(self) -> None:
        """Raise `EngineError` if ranks ran different modules in the first step. Collective.

        Under ZeRO-3 such ranks gather mismatched weights and compute wrong numbers without an
        error; this stops them before the first update. Later calls return at once.
        """
        if self._sequence is None:
            return
        checksum = self._sequence.finish()
        self._sequence = None
        if len({value for value in self.gather_objects(checksum)}) > 1:
            raise EngineError(
                "ranks ran different modules in the first step, and under ZeRO-3 all must run the "
                "same ones; have the same versions and backbone on every machine, or leave "
                "run.ds_config out"
            )

    def free_bytes(self) -> float:
        """Memory that this process may still allocate: on its GPU, or its share of the host's."""
        if self.device.type == "cuda":
            return float(torch.cuda.mem_get_info(self.device)[0])
        available = psutil.virtual_memory().available
        return available / ranks_here()

    # -- collectives: every rank must call them ----------------------------------------------

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def open_patient_group(self) -> None:
        """Create the process group of `wait_for_all`. Collective: call it before ranks diverge."""
        if self.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait_for_all(self) -> None:
        """Wait for ranks that may be hours behind, where other collectives would time out."""
        if self._patient is not None:
            work = dist.barrier(group=self._patient, async_op=True)
            stopping.wait_for(work, "all jobs of this rank are finished")

    def check_equal(self, tensors: Sequence[Tensor], *, what: str) -> None:
        """Raise `EngineError` if the tensors differ between ranks, bit for bit. Collective."""
        digest = 0
        for tensor in tensors:
            data = tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy()
            digest = zlib.crc32(data.tobytes(), digest)
        values = self.gather_objects(digest)
        if len(set(values)) > 1:
            raise EngineError(
                f"{what} differ between ranks (checksums {values}); start again from the last save"
            )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self.close(is_failing=failure is not None)

    def close(self, *, is_failing: bool = False) -> None:
        """Leave the process group; if this rank `is_failing`, the others end too."""
        if self._heartbeat is not None:
            self._heartbeat.leave(is_failing=is_failing)
        # one that fails ends soon; to leave properly NCCL would wait for what others may never do
        waits = is_failing and self.world_size > 1 and self.device.type == "cuda"
        if dist.is_initialized() and not waits:
            dist.destroy_process_group()


def _is_on_gpu() -> bool:
    """Whether this rank takes a GPU; raises `EngineError` if there is none for it."""
    wanted = os.environ.get("DS_ACCELERATOR")
    if wanted == "cpu":
        return False
    number, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if wanted == "cuda" and not n_gpus:
        raise EngineError("DS_ACCELERATOR=cuda, but torch finds no GPU here; set it to cpu")
    if n_gpus and number >= n_gpus:
        raise EngineError(
            f"LOCAL_RANK={number}, but this machine has {n_gpus} GPU(s); start as many ranks as it "
            "has, or set DS_ACCELERATOR=cpu"
        )
    return torch.cuda.is_available()


class _ModuleSequence:
    """A running checksum of the names of the modules whose forward a rank runs."""

    def __init__(self, model: nn.Module) -> None:
        self._digest = 0
        self._handles = [
            module.register_forward_pre_hook(self._note(name))
            for name, module in model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, inputs: Any) -> None:
            self._digest = zlib.crc32(name.encode(), self._digest)

        return note

    def finish(self) -> int:
        """Remove the hooks and return the checksum."""
        for handle in self._handles:
            handle.remove()
        return self._digest
