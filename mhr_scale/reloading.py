"""Exported folders as stock PEFT and transformers compute them, against our own adapter.

The only module that imports peft. Everything runs on one backbone in float32 on the CPU, over a few
fixed pseudo-random rows of tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale import backbone
from mhr_scale.adapters import Adapter, detach, state
from mhr_scale.adapters.methods import wrap
from mhr_scale.backbone import Blueprint
from mhr_scale.errors import AdapterError
from mhr_scale.merging import Weight, merge

#: Largest difference of logits, as a share of the largest logit, between two that are the same.
LIMIT = 1e-5
N_ROWS, N_INPUTS, N_TARGETS = 8, 12, 6


class Bench:
    """A backbone that adapters are put into by turns, and the rows that they answer."""

    def __init__(self, blueprint: Blueprint) -> None:
        self._model = _load(blueprint)
        generator = torch.Generator().manual_seed(0)
        vocab_size = blueprint.model_config.vocab_size
        self._rows = {
            name: torch.randint(2, vocab_size, (N_ROWS, length), generator=generator)
            for name, length in (("input_ids", N_INPUTS), ("decoder_input_ids", N_TARGETS))
        }

    def own(self, adapter: Adapter, task_ids: Sequence[int]) -> Tensor:
        """Logits of our adapter; a task of its own for every row."""
        adapter.bind(wrap(self._model, adapter.sites))
        try:
            with torch.no_grad(), adapter.slots(task_ids):
                return self._logits(self._model)
        finally:
            detach(self._model)
            adapter.linears = []

    def peft(self, folder: Path, task_ids: Sequence[int] | None = None) -> Tensor:
        """Logits of a PEFT folder under stock PEFT; `task_ids` for Poly."""
        from peft import PeftModel

        extra = {} if task_ids is None else {"task_ids": torch.tensor(list(task_ids))}
        with _quiet():
            stock = PeftModel.from_pretrained(self._model, folder).eval()
        try:
            return self._logits(stock, **extra)
        finally:
            stock.unload()

    @torch.no_grad()
    def merge(self, adapter: Adapter, weights: Sequence[Weight]) -> tuple[Tensor, Tensor]:
        """Logits with a single adapter added into the weights, before and after their rounding.

        The backbone keeps it.
        """
        pairs, scale = state.named_tensors(adapter), adapter.config.scale
        parameters = dict(self._model.named_parameters())
        for weight in weights:
            own = parameters[weight.name]
            own.copy_(merge(weight.name, own, pairs, scale=scale))
        before = self._logits(self._model)
        for weight in weights:
            parameters[weight.name].copy_(parameters[weight.name].to(weight.dtype))
        return before, self._logits(self._model)

    def stock(self, blueprint: Blueprint, folder: Path) -> Tensor:
        """Logits of a folder that transformers loads, which takes the place of the backbone.

        Raises `AdapterError` if names are missing or unknown.
        """
        del self._model
        with _quiet():
            self._model, found = blueprint.model_class.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        odd = {kind: sorted(names)[:3] for kind, names in found.items() if names}
        if odd:
            raise AdapterError(f"transformers does not load the merged backbone: {odd}")
        return self._logits(self._model.eval())

    @torch.no_grad()
    def _logits(self, model: Any, **extra: Tensor) -> Tensor:
        logits: Tensor = model(**self._rows, **extra, use_cache=False).logits
        return logits


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors of logits, as a share of the largest of `expected`."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_same(found: Tensor, expected: Tensor, *, what: str) -> float:
    """The difference of logits; raises `AdapterError` if it is larger than rounding makes it."""
    measured = difference(found, expected)
    if not measured <= LIMIT:
        raise AdapterError(
            f"{what}: its logits differ from the original's by {measured:.1e} of the largest, more "
            f"than {LIMIT:.0e}; nothing was exported"
        )
    return measured


def spread(n_tasks: int, most: int = N_ROWS) -> list[int]:
    """Numbers of some tasks, the first and the last among them; all if there are few."""
    if n_tasks <= most:
        return list(range(n_tasks))
    return [number * (n_tasks - 1) // (most - 1) for number in range(most)]


def _load(blueprint: Blueprint) -> nn.Module:
    """The backbone in float32 on the CPU, tensor by tensor."""
    with torch.device("meta"):
        model = backbone.make_model(blueprint).float()
    model = model.to_empty(device="cpu")
    backbone.tie(model, blueprint)
    model.requires_grad_(False)
    for name, parameter in backbone.plan_copies(model, blueprint.source).items():
        stored = blueprint.source.read(name, 0, parameter.numel())
        parameter.data.copy_(stored.reshape(parameter.shape))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back advice about the backbone's own configuration: its owner did not ask for it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
