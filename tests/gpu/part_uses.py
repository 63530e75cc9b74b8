"""What is done with backbones and adapters: 8 and 4 bits, few-shot waves, PEFT, trained weights."""

import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapters import tiny
from backbone import quantised_backbones as quantised
from board import Board, Found, Scale
from compared import (
    CPU,
    EPS,
    distance,
    furthest,
    furthest_of_numbers,
    held,
    on_cpu,
    share_of_equal,
    where,
    without_tf32,
)
from families.laid_rows import make_rows
from jobs.small_jobs import Bench, Case, make_case, make_source
from peft import PeftModel
from processes import ROOT
from torch import Tensor

from mhr_scale.adapters import Adapter, AdapterConfig, peft_folders
from mhr_scale.adapters.collapse import average
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig, OptimConfig, VariantConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import place
from mhr_scale.training.optim import make_optimizer

SHARED = Path(os.environ.get("MHR_SHARED", ROOT.parent / "shared"))
FLOAT32 = 1e-5
BFLOAT16 = EPS[torch.bfloat16]
#: Quantised backbones by kind and type, and how far logits may be from those of whole weights.
#: In 8 bits activations are rounded too, to 1 of 127 of the largest of a token.
QUANTISED = {
    ("nf4", "float32"): FLOAT32,
    ("nf4", "bfloat16"): 4 * BFLOAT16,
    ("int8", "float32"): 0.03,
    ("int8", "bfloat16"): 0.03 + 4 * BFLOAT16,
}
#: Waves by name: the variant, and settings of the protocol.
WAVES: dict[str, tuple[VariantConfig, dict[str, Any]]] = {
    "MHR": (VariantConfig(adapter="source"), {}),
    "MHR, T-Few": (VariantConfig(adapter="source"), {"loss": "t_few"}),
    "routing": (VariantConfig(adapter="source", kind="routing"), {}),
    "LoRA": (VariantConfig(fresh=AdapterConfig(n_skills=1, rank=4), lr=1e-2), {}),
}
N_JOBS = 8
#: AdamW moves numbers whose gradients are rounding alone: losses are compared, not adapters.
JOBS = 1e-4
EXPORTED = {
    "average of MHR": (AdapterConfig(n_skills=3, n_splits=4, rank=2, alpha=3.0), True),
    "MHR": (AdapterConfig(n_skills=3, n_splits=4, rank=2, alpha=1.0), False),
    "(IA)3": (AdapterConfig(kind="ia3", layout="light", n_skills=1), False),
}
REAL = SHARED / "backbones" / "t5_mini_text"
TASK_IDS = (2, 0, 2, 1, 3, 3)


def measure(board: Board, scale: Scale) -> None:
    """Quantised backbones, waves, PEFT folders, a real backbone."""
    without_tf32()
    if scale.on_gpu:  # read when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with where(scale):
        for kind, dtype in QUANTISED:
            if scale.is_tiny and dtype == "float32":
                continue
            board.run(f"{kind}, {dtype}", lambda k=kind, d=dtype: in_few_bits(k, d))
        for name in ("MHR, T-Few",) if scale.is_tiny else WAVES:
            title = f"wave of {N_JOBS}: {name}"
            board.run(title, lambda name=name: wave(name, scale))
            board.run(f"{title}, deterministic", lambda name=name: repeated(name, scale))
        for name in EXPORTED:
            board.run(f"PEFT folder: {name}", lambda name=name: exported(name, scale))
        board.run("real backbone", real)


def in_few_bits(kind: str, dtype: str) -> Found:
    """Logits and gradients against those of the weights that are stored; steps of training."""
    model = quantised.build(kind, dtype=dtype)
    whole = quantised.with_whole_weights(model, quantised.build("none", dtype=dtype))
    logits = distance(*({"": quantised.logits(one)} for one in (model, whole)))
    found, expected = (
        quantised.gradients(one, quantised.make_adapter(one)) for one in (model, whole)
    )
    first, last = train(quantised.build(kind, dtype=dtype))
    most = QUANTISED[kind, dtype]
    gradients = distance(found, expected)
    return Found(
        {"logits": logits, "gradients": gradients, "first_loss": first, "last_loss": last},
        holds=logits <= most and gradients <= 3 * most and last < 0.9 * first,
        goal=f"logits within {most:.2g} and gradients within {3 * most:.2g} of the weights' that "
        "are stored; ten steps take a tenth of the loss",
    )


def train(model: Any, steps: int = 10) -> tuple[float, float]:
    """The losses of the first and the last step on one batch; NaN if one of them is none."""
    adapter = quantised.make_adapter(model)
    optimizer = make_optimizer(adapter, OptimConfig(name="adamw", lr=2e-2, routing_lr=0.1))
    losses = []
    model.train()
    for _ in range(steps):
        with adapter.slots(quantised.TASK_IDS) as slots:
            loss = model(**quantised.batch(model)).loss
            slots.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    return values[0], values[-1] if all(map(math.isfinite, values)) else math.nan


def wave(name: str, scale: Scale) -> Found:
    """Eight jobs together, of which some end before others, against each of them alone."""
    case, bench = make_jobs(name), Bench(device=scale.device)
    together = bench.train(case.open(device=scale.device))
    ours: list[float] = []
    theirs: list[float] = []
    n_equal = 0
    for number, member in enumerate(case.members):
        alone = bench.train(case.open([number], device=scale.device))
        job = member.job
        numbers = [
            [values[key] for values in one.values[job] for key in ("loss", "grad_norm")]
            for one in (together, alone)
        ]
        ours += numbers[0]
        theirs += numbers[1]
        tensors = share_of_equal(together.tensors[job], alone.tensors[job])
        n_equal += numbers[0] == numbers[1] and tensors == 1.0
    far = furthest_of_numbers(ours, theirs)
    is_exact = not scale.on_gpu
    return Found(
        {"losses": far, "jobs_equal_bit_for_bit": n_equal},
        holds=n_equal == N_JOBS if is_exact else far <= JOBS,
        goal="bit for bit" if is_exact else "losses and norms within 1e-4; bits are a figure",
    )


def repeated(name: str, scale: Scale) -> Found:
    """The same under torch's deterministic forms, and the wave a second time."""
    torch.use_deterministic_algorithms(True)
    try:
        found = wave(name, scale)
        case, bench = make_jobs(name), Bench(device=scale.device)
        one, other = (bench.train(case.open(device=scale.device)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    is_same = one.values == other.values and all(
        share_of_equal(one.tensors[job], tensors) == 1.0 for job, tensors in other.tensors.items()
    )
    values = {**found.values, "repeats": "bit for bit" if is_same else "not bit for bit"}
    goal = f"together and alone: {found.goal}; a second time: bit for bit"
    return Found(values, holds=found.holds and is_same, goal=goal)


def make_jobs(name: str) -> Case:
    """Eight jobs of three to five steps."""
    variant, protocol = WAVES[name]
    source = None if variant.fresh else make_source()
    steps = [3 + number % 3 for number in range(N_JOBS)]
    return make_case(variant, source, steps=steps, **protocol)


def exported(name: str, scale: Scale) -> Found:
    """Logits of a folder in stock PEFT on the device, against the adapter it was written of."""
    config, is_averaged = EXPORTED[name]
    _, adapter = tiny.make_adapted(config, dtype=torch.float32)
    if is_averaged:
        adapter = average(adapter)
    ids = TASK_IDS if adapter.config.is_routed else [0] * len(TASK_IDS)
    truth = native(adapter, ids, CPU)
    with tempfile.TemporaryDirectory() as folder:
        write_of(adapter)(adapter, Path(folder), base_model=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock: Any = PeftModel.from_pretrained(tiny.make_t5(), folder)
    stock = stock.to(scale.device).eval()
    extra = {"task_ids": torch.tensor(ids, device=scale.device)} if adapter.config.is_routed else {}
    batch = tiny.batch_for(stock, len(ids))
    with torch.no_grad():
        theirs = stock(**batch, **extra).logits
    ours = native(adapter, ids, scale.device)
    bare = tiny.make_t5().to(scale.device).eval()
    with torch.no_grad():
        without = bare(**batch).logits
    values = {
        "stock_to_ours": furthest({"": theirs}, {"": ours}),
        "ours_to_cpu": furthest({"": ours}, {"": truth}),
    }
    found = held(values, FLOAT32, "within 1e-5, and the adapter moves the logits by a tenth")
    moved = furthest({"": without}, {"": ours})
    return Found({**found.values, "adapter": moved}, found.holds and moved > 0.1, found.goal)


def write_of(adapter: Adapter) -> Callable[..., Any]:
    """The function that writes a folder for an adapter of this kind."""
    if adapter.config.is_routed:
        return peft_folders.write_peft_poly
    kinds = {"lora": peft_folders.write_peft_lora, "ia3": peft_folders.write_peft_ia3}
    return kinds[adapter.config.kind]


def native(adapter: Adapter, ids: Any, device: torch.device) -> Tensor:
    """Logits of our adapter on a device."""
    model = tiny.make_t5().to(device).eval()
    return tiny.logits(model, tiny.attach_copy(model, adapter), ids)


def real() -> Found:
    """Logits of rows laid flat over a small T5 that was trained, in float32 and bfloat16."""
    if not REAL.is_dir():
        return Found({"skipped": f"there is no {REAL} (variable MHR_SHARED)"})
    with on_cpu():
        truth = logits_of("float32")
    values = {
        dtype: distance({"": logits_of(dtype, is_flat=True)}, {"": truth})
        for dtype in ("float32", "bfloat16")
    }
    return Found(
        values,
        holds=values["float32"] <= FLOAT32 and values["bfloat16"] <= 8 * BFLOAT16,
        goal="norms of differences from the CPU's within 1e-5 and 8 eps of bfloat16 (0.0625)",
    )


def logits_of(dtype: str, *, is_flat: bool = False) -> Tensor:
    """Logits of its at the targets, where this process runs."""
    config = BackboneConfig(name=str(REAL), dtype=dtype)  # type: ignore[arg-type]
    placed = place(Engine({}, timeout_seconds=60.0), config, read_blueprint(config), ())
    packed = placed.pack(make_rows(), is_flat=is_flat)
    with torch.no_grad(), packed.in_use():
        logits = placed.logits(packed)
    return logits.where((packed.labels_BD >= 0)[..., None], 0.0).float().cpu()
