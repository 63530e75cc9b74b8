"""Exported folders are reloaded with stock PEFT or transformers and compared with our adapter.

Everything runs in float32 on the CPU, on a few fixed pseudo-random token rows. Weights are made
when their module runs and freed after it, so a backbone that is larger than memory is no matter.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters import Adapter, artefact, detach, peft_folders
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.merging import merging_of
from mhr_scale.backbone.on_demand import (
    Demanded,
    Weights,
    hollow_model,
    take_weights,
    weights_on_demand,
)
from mhr_scale.backbone.quantised_parts import import_bitsandbytes
from mhr_scale.backbone.shards import Weight
from mhr_scale.errors import AdapterError, first_line
from mhr_scale.exchange.stock import quiet
from mhr_scale.families.packed import EncodedRow

#: Logits that differ by at most this share of the largest logit count as the same, ...
LIMIT = 1e-5
#: ... and by at most so many times what the last bits of the adapter's numbers do to them.
MARGIN = 10.0
#: Where last bits move logits by more than this share, no comparison tells anything.
LOUDEST = 0.01
N_ROWS, N_INPUTS, N_TARGETS = 8, 12, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedAdapter:
    """A folder that is written, and the adapter that it has to agree with.

    `make` gives the adapter that is written, to `folder` below the target. It is compared with
    `original` on rows of the tasks `task_ids`.
    """

    what: str
    make: Callable[[], Adapter]
    original: Adapter
    task_ids: tuple[int, ...] = (0,) * N_ROWS
    folder: str = "."

    @property
    def exported_ids(self) -> tuple[int, ...]:
        """The rows' tasks in the written adapter: those of the original if all of it is written."""
        return self.task_ids if self.what in ("whole", "clusters") else (0,) * N_ROWS


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAdapter:
    """A LoRA folder, and the task of an adapter that it has to agree with.

    `open` reads that adapter, which `source` tells from others; `make` gives of it what is written.
    """

    folder: Path
    source: str
    open: Callable[[], Adapter]
    task_id: int
    make: Callable[[Adapter], Adapter]


class LogitsCheck:
    """One backbone that adapters are put into in turn, and the rows whose logits are compared.

    It holds no weight between its calls, and one module's weights within them.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self._blueprint, self._family = blueprint, blueprint.family
        self._model, self._weights = hollow_model(blueprint)
        generator = torch.Generator().manual_seed(0)
        size = blueprint.model_config.vocab_size
        inputs, targets = (
            torch.randint(2, size, (N_ROWS, length), generator=generator).numpy()
            for length in (N_INPUTS, N_TARGETS)
        )
        self._rows = [
            EncodedRow(*row) for row in zip(inputs, [(ids,) for ids in targets], strict=True)
        ]

    @property
    def n_bytes(self) -> int:
        """Size of the stored weights, which every pass reads."""
        return sum(weight.n_bytes for weight in self._weights.values())

    def native(self, adapter: Adapter, task_ids: Sequence[int]) -> Tensor:
        """Logits under our own adapter, with a task per row; the rows come again for more tasks."""
        adapter.bind(wrap(self._model, adapter.sites))
        try:
            with torch.no_grad(), adapter.slots(task_ids):
                return self._logits(self._model, self._weights, times=len(task_ids) // N_ROWS)
        finally:
            detach(self._model)
            adapter.release()

    def noise(self, adapter: Adapter, task_ids: Sequence[int], expected: Tensor) -> float:
        """How far logits move, at most, if every number of an adapter moves by its last bit.

        Strong adapters amplify roundings: what is right to the last bit then differs by that much.
        `expected` are the adapter's own logits.
        """
        generator = torch.Generator().manual_seed(0)
        moved, differences = deepcopy(adapter), []
        with torch.no_grad():
            for _ in range(2):
                for parameter, stored in zip(
                    moved.inventory.parameters(), adapter.inventory.parameters(), strict=True
                ):
                    sign = torch.randint(0, 2, stored.shape, generator=generator) * 2 - 1
                    parameter.copy_(stored * (1 + sign * torch.finfo(torch.float32).eps))
                differences.append(_difference(self.native(moved, task_ids), expected))
        return max(differences)

    def peft(self, folder: Path, task_ids: Sequence[int]) -> Tensor:
        """Logits of a PEFT folder under stock PEFT, with one task per row for Poly.

        Raises `AdapterError` if PEFT does not load it, or cannot run it with this backbone.
        """
        import_bitsandbytes()  # before PEFT does, which prints remarks
        from peft import PeftModel

        try:
            with quiet():
                stock = PeftModel.from_pretrained(self._model, folder).eval()
        except Exception as error:
            raise AdapterError(f"stock PEFT does not load it: {first_line(error)}") from error
        is_poly = stock.peft_config["default"].peft_type == "POLY"
        extra = {"task_ids": torch.tensor(list(task_ids))} if is_poly else {}
        try:
            return self._logits(stock, self._weights, extra=extra)
        except RuntimeError as error:
            raise AdapterError(f"stock PEFT does not run it: {first_line(error)}") from error
        finally:
            stock.unload()

    def mixed(self, folders: Sequence[Path]) -> Tensor:
        """Logits of one batch under stock PEFT in which every row has a LoRA folder of its own.

        Raises `AdapterError` if PEFT does not load one, or cannot run them with this backbone.
        """
        import_bitsandbytes()  # before PEFT does, which prints remarks
        from peft import PeftModel

        names = {folder: f"lora_{number}" for number, folder in enumerate(dict.fromkeys(folders))}
        stock: Any = None
        try:
            with quiet():
                for folder, name in names.items():
                    if stock is None:
                        stock = PeftModel.from_pretrained(self._model, folder, adapter_name=name)
                    else:
                        stock.load_adapter(folder, adapter_name=name)
                extra = {"adapter_names": [names[folder] for folder in folders]}
                return self._logits(stock.eval(), self._weights, extra=extra)
        except Exception as error:
            raise AdapterError(
                f"stock PEFT does not run its LoRAs in one batch: {first_line(error)}"
            ) from error
        finally:
            if stock is not None:
                stock.unload()

    def merged(self, adapter: Adapter, weights: Sequence[Weight]) -> tuple[Tensor, Tensor]:
        """Logits with a single adapter merged into the weights, before and after rounding them."""
        summed = merging_of(adapter, self._blueprint)
        dtypes = {weight.name: weight.dtype for weight in weights}

        def rounded(name: str, weight: Tensor) -> Tensor:
            return summed(name, weight).to(dtypes[name]).float()

        exact = self._logits(self._model, self._changed(summed))
        if set(dtypes.values()) == {torch.float32}:
            return exact, exact
        return exact, self._logits(self._model, self._changed(rounded))

    def _changed(self, change: Callable[[str, Tensor], Tensor]) -> Weights:
        """The weights with a change that is made to each when it is needed."""

        def changed(weight: Demanded) -> Demanded:
            return replace(weight, make=lambda: change(weight.name, weight.make()))

        return {hollow: changed(weight) for hollow, weight in self._weights.items()}

    def stock(self, folder: Path, weights: Sequence[Weight]) -> Tensor:
        """Logits of a folder with these weights as transformers loads it.

        In the widest data type of the weights, in which transformers maps the files. Raises
        `AdapterError` if it does not load, or if tensors are missing or unknown.
        """
        dtype = reduce(torch.promote_types, {weight.dtype for weight in weights})
        model_class = self._family.model_class(self._blueprint.model_config)
        try:
            with quiet():
                model, info = model_class.from_pretrained(
                    folder, dtype=dtype, output_loading_info=True
                )
        except Exception as error:
            raise AdapterError(f"transformers does not load it: {first_line(error)}") from error
        odd = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}
        if odd:
            raise AdapterError(f"transformers does not load it as it is: {odd}")
        return self._logits(model.eval(), take_weights(model))

    @torch.no_grad()
    def _logits(
        self, model: Any, weights: Weights, *, times: int = 1, extra: Mapping[str, Any] = {}
    ) -> Tensor:
        """Logits of the rows, so many times one after the other."""
        packed = self._family.pack(self._rows * times, self._blueprint.model_config, pad_multiple=1)
        packed = replace(packed, inputs={**packed.inputs, **extra})
        with weights_on_demand(model, weights, what="compare"):
            return self._family.logits(model, packed)


def expected_logits(check: LogitsCheck, parts: Sequence[ExportedAdapter]) -> list[Tensor]:
    """The logits of the original of each part; tasks of one adapter are computed in one pass."""
    original = parts[0].original
    assert all(part.original is original for part in parts)
    task_ids = [number for part in parts for number in part.task_ids]
    return list(check.native(original, task_ids).split(N_ROWS))


def check_peft(
    check: LogitsCheck, exported: ExportedAdapter, folder: Path, *, expected: Tensor
) -> float:
    """The difference of the logits under stock PEFT.

    Raises `AdapterError` if it is too large, or if a single adapter is not stored bit for bit.
    """
    noise = partial(check.noise, exported.original, exported.task_ids, expected)
    logits = check.peft(folder, exported.exported_ids)
    difference = _check(logits, expected, what="what stock PEFT loads", noise=noise)
    if not exported.make().config.is_routed:
        _check_tensors(peft_folders.open_adapter(folder)[1], exported.make())
    return difference


def check_mixed(check: LogitsCheck, served: Sequence[ServedAdapter]) -> float:
    """The difference of the logits of one batch whose rows have the LoRAs in turn, in stock PEFT.

    `served` are at most as many as the batch has rows; each row is compared with its original's.
    Raises `AdapterError` if the difference is too large, or if a LoRA is not stored bit for bit.
    """
    rows = [served[number % len(served)] for number in range(N_ROWS)]
    expected: dict[int, Tensor] = {}
    noises: list[Callable[[], float]] = []
    for source in dict.fromkeys(one.source for one in served):
        original = next(one.open() for one in served if one.source == source)
        mine = [number for number, one in enumerate(rows) if one.source == source]
        ids = tuple((one if one.source == source else rows[mine[0]]).task_id for one in rows)
        logits = check.native(original, ids)
        expected |= {number: logits[number] for number in mine}
        noises.append(partial(check.noise, original, ids, logits))
        for one in served:
            if one.source == source:
                _check_tensors(peft_folders.open_adapter(one.folder)[1], one.make(original))
    originals = torch.stack([expected[number] for number in range(N_ROWS)])
    mixed = check.mixed([one.folder for one in rows])
    what = "what stock PEFT loads"
    return _check(mixed, originals, what=what, noise=lambda: max(noise() for noise in noises))


def check_native(
    check: LogitsCheck, exported: ExportedAdapter, folder: Path, *, expected: Tensor
) -> float:
    """The difference of the logits under a written artefact.

    Raises `AdapterError` if it is too large, or if a stored bit differs.
    """
    reloaded = artefact.load(folder)
    _check_tensors(reloaded, exported.make())
    logits = check.native(reloaded, exported.exported_ids)
    noise = partial(check.noise, reloaded, exported.exported_ids, logits)
    return _check(logits, expected, what="the artefact", noise=noise)


def check_merged(
    check: LogitsCheck,
    exported: ExportedAdapter,
    folder: Path,
    *,
    expected: Tensor,
    weights: Sequence[Weight],
) -> tuple[float, float]:
    """The largest difference due to merging, and the one that rounding the weights adds.

    The sum before rounding is compared with the original, and the files with the rounded sum.
    Raises `AdapterError` if either difference is too large.
    """
    noise = cache(partial(check.noise, exported.original, exported.task_ids, expected))
    exact, rounded = check.merged(exported.make(), weights)
    merged = _check(exact, expected, what="the merged weights", noise=noise)
    logits = check.stock(folder, weights)
    stored = _check(logits, rounded, what="what transformers loads", noise=noise)
    return max(merged, stored), _difference(rounded, exact)


def _check_tensors(reloaded: Adapter, expected: Adapter) -> None:
    """Raise `AdapterError` unless two adapters have the same bits under the same names."""
    tensors, stored = (artefact.named_tensors(adapter) for adapter in (expected, reloaded))
    odd = [name for name in tensors if not torch.equal(tensors[name].float(), stored[name])]
    if odd:
        raise AdapterError(f"{len(odd)} tensor(s) of what was written differ, such as {odd[0]}")


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors of logits, as a share of the largest of `expected`."""
    return float((logits - expected).abs().max() / expected.abs().max())


def _check(logits: Tensor, expected: Tensor, *, what: str, noise: Callable[[], float]) -> float:
    """The difference of the logits; raises `AdapterError` if it is more than rounding explains.

    `noise` measures that where the usual limit is passed.
    """
    difference = _difference(logits, expected)
    if difference <= LIMIT:
        return difference
    loudness = noise()
    limit = max(LIMIT, MARGIN * loudness)
    if loudness > LOUDEST:
        raise AdapterError(
            f"the last bits of the adapter's numbers move the logits by {loudness:.1e} of the "
            "largest: no comparison can tell whether it is right; set check: false"
        )
    if not difference <= limit:
        raise AdapterError(
            f"the logits of {what} differ from the original's by {difference:.1e} of the largest, "
            f"more than {limit:.0e}"
        )
    return difference


def spread(n_tasks: int, most: int = N_ROWS) -> list[int]:
    """Numbers of some tasks, the first and the last among them; all if there are few."""
    if n_tasks <= most:
        return list(range(n_tasks))
    return [number * (n_tasks - 1) // (most - 1) for number in range(most)]
