"""Adapters with no trivial tensor on the toy backbone, stored as runs, and their logits."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, attach, detach, find_sites
from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.config import ExportConfig
from mhr_scale.verbs.export import export

BASE = BUILTIN["builtin:toy"]
FACTS = {"name": "builtin:toy", "dtype": "float32"}
TASKS = ("copy.plus1.plain", "sort/it", "reverse.mirror.after")
N_ROWS = 6
MHR = AdapterConfig(layout="attention", rank=2, n_skills=3, n_splits=4, alpha=1.0)
KINDS = {
    "MHR": MHR,
    "MHR of alpha 3": replace(MHR, alpha=3.0),
    "light MHR": replace(MHR, layout="light"),
    "Poly": replace(MHR, n_splits=1),
    "LoRA": AdapterConfig(layout="full", rank=2, n_skills=1, alpha=3.0),
    "IA3": AdapterConfig(kind="ia3", layout="full", n_skills=1),
    "MHR-IA3": replace(MHR, kind="ia3"),
    "private": AdapterConfig(layout="attention", rank=2, n_skills=1, private=True),
    "shared routing": replace(MHR, granularity="block"),
    "uniform": replace(MHR, policy="uniform"),
}


@cache
def toy_t5() -> T5ForConditionalGeneration:
    """The toy backbone as transformers loads it, in float32."""
    return T5ForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32).eval()


def make(kind: str, *, tasks: Sequence[str] = TASKS, seed: int = 0) -> Adapter:
    """An adapter of this kind that moves the toy backbone's logits a good deal."""
    config = KINDS[kind]
    adapter = Adapter(config, find_sites(toy_t5(), config.layout), task_names=tasks)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "routing_logits":
            parameter.data.copy_(2.0 * noise)
        else:
            parameter.data.copy_(1.0 + 0.2 * noise if config.kind == "ia3" else 0.2 * noise)
    return adapter


def save_run(folder: Path, adapter: Adapter, **facts: Any) -> str:
    """Store an adapter as a run or a finished job does; returns the run's folder."""
    artefact.save(adapter, folder / "adapter", **{"backbone": FACTS, **facts})
    return str(folder)


def save_runs(folder: Path, *kinds: str) -> Path:
    """A run for each kind of adapter, called by it."""
    for kind in kinds:
        save_run(folder / kind, make(kind))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows() -> dict[str, Tensor]:
    """Fixed inputs, some of them padded, and decoder inputs."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(2, 50, (N_ROWS, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[::2, -3:] = 0
    decoder_input_ids = torch.randint(2, 50, (N_ROWS, 5), generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_input_ids,
    }


def native_logits(
    adapter: Adapter,
    task_ids: Sequence[int] = (0,) * N_ROWS,
    *,
    model: T5ForConditionalGeneration | None = None,
) -> Tensor:
    """What our adapter gives on a backbone, by default transformers' own loading of the toy's."""
    model = model or toy_t5()
    copied = attach(model, adapter.config, tasks=adapter.task_names)
    artefact.load_tensors(copied, artefact.named_tensors(adapter), place="the other adapter")
    with torch.no_grad(), copied.slots(task_ids):
        logits = model(**rows()).logits
    detach(model)
    return logits


def stock_logits(folder: Path) -> Tensor:
    """What transformers gives of a merged backbone; every name has to be known and there."""
    model, found = T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values())
    with torch.no_grad():
        return model.eval()(**rows()).logits


def run_export(adapter: str, folder: Path, **changes: Any) -> Path:
    """Export with these settings."""
    return export(ExportConfig(adapter=adapter, folder=str(folder), **changes))


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * largest)


def assert_same(found: Adapter, expected: Adapter) -> None:
    """Bit for bit the same tensors under the same names, of the same settings and tasks."""
    theirs, ours = artefact.named_tensors(found), artefact.named_tensors(expected)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert (found.config, found.sites) == (expected.config, expected.sites)
    assert found.task_names == expected.task_names
