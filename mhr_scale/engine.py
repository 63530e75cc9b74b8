"""Processes, placement of the backbone, and the one collective of a step.

The only module that imports deepspeed. DeepSpeed carries the frozen weights (ZeRO-3 sharding,
gathering, offload); it never sees an adapter parameter, so it cannot partition, cast or reduce one.
"""

import json
import logging
import os
import warnings
import zlib
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from mhr_scale import backbone, nvme, quantise, stopping
from mhr_scale.adapters.linear import AdaptedLinear, Siblings
from mhr_scale.backbone import Blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import EngineError, describe_fault, did_you_mean
from mhr_scale.files import read_object
from mhr_scale.filling import fill
from mhr_scale.runlog import log, rank, ranks_here, world_size

CHECKOUT = Path(__file__).resolve().parent.parent
#: What a DeepSpeed file may say: placement and communication.
ALLOWED = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "aio",
)
#: What the recipe says instead.
OWNED = {
    "train_batch_size": "batch.batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.batch_size and batch.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "backbone.dtype",
    "fp16": "backbone.dtype",
    "data_types": "backbone.dtype",
}


def read_ds_config(name: str | None) -> dict[str, Any]:
    """Read and check a DeepSpeed file, from the current folder or the checkout; None: replicated.

    Raises `EngineError` for a key that is unknown, stands twice or is owned by the recipe, for
    "auto", for what DeepSpeed itself refuses, and for a ZeRO stage other than 0 and 3: frozen
    weights have neither gradients nor optimizer states.
    """
    if name is None:
        return {"zero_optimization": {"stage": 0}}
    candidates = [Path(name), CHECKOUT / name]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        looked = ", ".join(dict.fromkeys(str(candidate.resolve()) for candidate in candidates))
        raise EngineError(f"run.ds_config: no file '{name}' (looked at {looked})")
    content = read_object(path, EngineError, hook=_no_key_twice)
    for key in content:
        if key in OWNED:
            raise EngineError(
                f"{path}: '{key}' belongs to the recipe ({OWNED[key]}); remove it here"
            )
        if key not in ALLOWED:
            hint = did_you_mean(key, ALLOWED)
            raise EngineError(f"{path}: unknown key '{key}'{hint}; allowed: {', '.join(ALLOWED)}")
    _refuse_auto(content, path, ())
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise EngineError(f"{path}: zero_optimization is an object, got {json.dumps(zero)}")
    stage = zero.get("stage", 0)
    if stage not in (0, 3):
        raise EngineError(
            f"{path}: zero_optimization.stage {stage!r}: frozen weights have no gradients and no "
            "optimizer states to shard; use 0 (replicated) or 3 (sharded)"
        )
    if stage == 3:
        _check_zero(zero, path)
    return content


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key '{key}' stands twice")
        content[key] = value
    return content


def _check_zero(zero: dict[str, Any], path: Path) -> None:
    """Raise `EngineError` for a key or a value that DeepSpeed refuses in its ZeRO section."""
    _import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["type"] == "extra_forbidden":
            name = ".".join(str(step) for step in fault["loc"])
            known = DeepSpeedZeroConfig.model_fields if len(fault["loc"]) == 1 else ()
            hint = did_you_mean(name, known)
            raise EngineError(f"{path}: unknown key 'zero_optimization.{name}'{hint}") from error
        place = ("zero_optimization", *fault["loc"])
        raise EngineError(f"{path}: {describe_fault(fault, place)}") from error


def _refuse_auto(value: Any, path: Path, keys: tuple[str, ...]) -> None:
    if value == "auto":
        raise EngineError(
            f'{path}: {".".join(keys)}: "auto" is a convention of another trainer and would be '
            "taken for DeepSpeed's default; give a value or leave the key out"
        )
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_auto(inner, path, (*keys, str(key)))


def deepspeed_config(content: dict[str, Any], *, dtype: str) -> dict[str, Any]:
    """The dictionary handed to DeepSpeed: the file plus the recipe's data type. A pure function.

    DeepSpeed insists on a batch size; ours is not its business, so it gets 1.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == "bfloat16"},
        **content,
    }


def is_sharded(content: dict[str, Any]) -> bool:
    """Whether a DeepSpeed file shards the frozen weights (ZeRO-3)."""
    return bool(content.get("zero_optimization", {}).get("stage", 0) == 3)


class Engine:
    """One process of a run: its rank, its device, and the backbone in its placement."""

    def __init__(self, ds_content: dict[str, Any], *, timeout_seconds: float) -> None:
        self.rank = rank()
        self.world_size = world_size()
        self.is_sharded = is_sharded(ds_content)
        self.timeout = timedelta(seconds=timeout_seconds)
        self._ds_content = ds_content
        self._runtime: Any = None
        self._sequence: _ModuleSequence | None = None
        self._patient: Any = None
        on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        self.device = torch.device("cpu")
        if not on_gpu and self.world_size > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here()))
        if on_gpu:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.world_size > 1 or self.is_sharded:
            self._join()

    @property
    def placement(self) -> str:
        """`replicated` or `zero3`."""
        return "zero3" if self.is_sharded else "replicated"

    def _join(self) -> None:
        """Join the process group, with a timeout, and with no compiled collective on CPU."""
        deepspeed = _import_deepspeed()
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        join = partial(dist.init_process_group, backend, timeout=self.timeout)
        if self.world_size == 1 and "MASTER_ADDR" not in os.environ:  # no launcher
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            join(store=dist.HashStore(), rank=0, world_size=1)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0":  # torchrun's store may still have the addresses of ranks that are gone
            store, *_ = next(dist.rendezvous("env://", timeout=self.timeout))
            store = dist.PrefixStore(f"attempt {attempt}", store)
            join(store=store, rank=self.rank, world_size=self.world_size)
        deepspeed.init_distributed(dist_backend=backend, timeout=self.timeout, verbose=False)

    # -- backbone ------------------------------------------------------------------------------

    def build(self, config: BackboneConfig, blueprint: Blueprint) -> nn.Module:
        """Build and fill the frozen backbone in its placement.

        Sharded from construction: under ZeRO-3 each rank reads and holds its own flat range of
        each tensor only.
        """
        if self.is_sharded:
            assert config.quantise == "none", "quantise.check comes first"
            deepspeed = _import_deepspeed()
            op = deepspeed.ops.op_builder.AsyncIOBuilder()
            nvme.check(self._ds_content, blueprint, n_ranks=self.world_size, op=op)
            ds_config = deepspeed_config(self._ds_content, dtype=config.dtype)
            with deepspeed.zero.Init(config_dict_or_path=ds_config):
                model = backbone.make_model(blueprint)
        else:
            with torch.device("meta"):
                model = backbone.make_model(blueprint).to(getattr(torch, config.dtype))
            quantise.allocate(model, config.quantise, self.device)
            backbone.tie(model, blueprint)
            model.requires_grad_(False)
        self._fill(model, config, blueprint)
        backbone.fuse(model, config)
        backbone.set_dropout(model, config.dropout)
        backbone.set_recompute(model, config.recompute)
        return model

    def _fill(self, model: nn.Module, config: BackboneConfig, blueprint: Blueprint) -> None:
        rank = self.rank if self.is_sharded else None
        fill(model, blueprint.source, kind=config.quantise, rank=rank, device=self.device)

    def prepare(
        self, model: nn.Module, config: BackboneConfig, *, always_backward: bool = False
    ) -> nn.Module:
        """Install the runtime that gathers sharded weights; adapters must sit in place already.

        Collective. Returns the module to call. A replicated model only learns to sum gradients in
        the order of a sharded one, where siblings gather their weights together. `always_backward`
        makes every backward pass run through every sharded module, whichever of them have an
        adapter: ranks with other adapters stay in step.
        """
        if not self.is_sharded:
            backbone.order_gradients(model)
            return model
        if always_backward:
            backbone.require_input_gradients(model)
        deepspeed = _import_deepspeed()
        for part in model.modules():
            if isinstance(part, AdaptedLinear | Siblings):
                deepspeed.utils.set_z3_leaf_module(part, True)
        ds_config = deepspeed_config(self._ds_content, dtype=config.dtype)
        self._runtime, *_ = deepspeed.initialize(model=model, config=ds_config)
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(self.timeout, group)
        module: nn.Module = self._runtime.module
        if self.world_size > 1:
            self._sequence = _ModuleSequence(module)
        return module

    def after_backward(self) -> None:
        """Release gathered weights that no backward hook released. Call after each backward pass.

        A block whose input needs no gradient never sees its hook; its weights would stay whole.
        """
        if self._runtime is not None:
            self._runtime.optimizer.release_backward_leftovers()

    def check_same_modules(self) -> None:
        """Raise `EngineError` if ranks ran different modules in the first step. Collective.

        Under ZeRO-3 such ranks gather different weights into each other and go on with wrong
        numbers; this stops them before the first update. Later calls return at once.
        """
        if self._sequence is None:
            return
        mine = self._sequence.finish()
        self._sequence = None
        if len({value for value in self.gather_objects(mine)}) > 1:
            raise EngineError(
                "ranks ran different modules in the first step, and under ZeRO-3 all must run the "
                "same ones; have the same versions and backbone on every machine, or leave "
                "run.ds_config out"
            )

    def free_bytes(self) -> float:
        """Memory that this process may still fill: of its GPU, or its share of the host's."""
        if self.device.type == "cuda":
            return float(torch.cuda.mem_get_info(self.device)[0])
        here = psutil.virtual_memory().available
        return here / ranks_here()

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
        """Prepare `wait_for_all`. Collective: call it while the ranks are still together."""
        if self.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait_for_all(self) -> None:
        """Wait for ranks that may be hours behind: other collectives give up after the timeout."""
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

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class _ModuleSequence:
    """A running checksum of the names of the modules a rank runs forward."""

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
        """Take the hooks off and return the checksum."""
        for handle in self._handles:
            handle.remove()
        return self._digest


def _import_deepspeed() -> Any:
    """Import DeepSpeed, quietly, with its compiled CPU collective switched off.

    That extension costs a compilation, and a killed run leaves a lock behind that hangs every
    later run on the machine.
    """
    import deepspeed

    # DeepSpeed 0.19 still calls a collective by the name that torch 2.13 deprecates
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not log.isEnabledFor(logging.DEBUG):
        deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed
