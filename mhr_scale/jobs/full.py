"""Jobs of kind backbone: full fine-tuning of the backbone's weights, beside an adapter (flag F).

There is one backbone, so such a job runs alone. The weights are copied to the host, trained in
place, and restored bit for bit however the job ends, so that later jobs see the original backbone.
The best weights are stored beside the best adapter, which is useless without them. There are no
intermediate saves.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mhr_scale.adapters import Adapter
from mhr_scale.config import AdaptConfig, OptimConfig
from mhr_scale.engine.ds_config import is_sharded
from mhr_scale.engine.opened import OpenedBackbone
from mhr_scale.errors import ConfigError
from mhr_scale.jobs import job_optim
from mhr_scale.jobs.wave import Wave
from mhr_scale.run.files import put_in_place
from mhr_scale.run.runlog import log
from mhr_scale.run.tensors import save_tensors
from mhr_scale.training import optim

#: File of a job's trained weights, in the result's folder and beside the best adapter.
WEIGHTS = "backbone.safetensors"


def check_backbone_jobs(config: AdaptConfig, backbone: OpenedBackbone) -> None:
    """Raise `ConfigError` if a variant would train a backbone that is sharded or not float32."""
    if not config.backbone_variants:
        return
    place = f"variants.{config.backbone_variants[0]}.kind: backbone"
    if is_sharded(backbone.ds_content):
        raise ConfigError(
            f"{place} trains weights that are whole on every rank, and {config.run.ds_config} "
            "shards them; leave run.ds_config out, or name a file of stage 0"
        )
    stored = backbone.blueprint.quantise
    if stored != "none":
        raise ConfigError(
            f"{place} trains weights, and {backbone.config.name} holds {stored} ones; name a "
            "folder of whole weights"
        )
    if backbone.config.dtype != "float32":
        way_out = "backbone.dtype: float32"
        if any(variant.adapter for variant in config.variants.values()):
            way_out = "backbone_dtype: float32 for all variants (the adapter brings the other one)"
        raise ConfigError(
            f"{place} trains weights in float32, not {backbone.config.dtype}; set {way_out}"
        )


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a backbone by their names without adapters, tied ones once."""
    return {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}


def make_weight_optimizer(
    weights: Sequence[nn.Parameter], config: OptimConfig, *, lr: float
) -> Optimizer:
    """The optimizer of a backbone's weights; Adafactor's statistics are per tensor."""
    group = {
        "params": list(weights),
        "lr": lr,
        "peak_lr": lr,
        "name": "backbone",
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return optim.make_adamw([group], config)
    return optim.Adafactor([group], scale_parameter=config.scale_parameter)


class FullWave(Wave):
    """A wave of one job that trains the weights of the backbone too. Train it inside `thawed`."""

    #: The trained weights and their optimizer, inside `thawed` only.
    weights: dict[str, nn.Parameter]
    weight_optimizer: Optimizer

    @contextmanager
    def thawed(self, model: nn.Module) -> Iterator[None]:
        """Let the weights of `model` train inside the block; they are restored at its end."""
        (member,) = self.members
        weights = named_weights(model)
        original = {name: weight.data.to("cpu") for name, weight in weights.items()}
        for name, weight in weights.items():  # on a CPU it may be a view of a file
            weight.data = original[name].to(weight.device, copy=True)
        folder = member.job.folder(Path(self.config.run.folder))
        was_started = (folder / "metrics.jsonl").exists()
        log.info(
            "%s: trains %d numbers of the backbone too; not saved before its end%s",
            member.job.name,
            sum(weight.numel() for weight in weights.values()),
            ", starts again" if was_started else "",
        )
        self.weights = weights
        self.weight_optimizer = make_weight_optimizer(
            list(weights.values()), self._optim, lr=self.variant.backbone_lr
        )
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            yield
        finally:
            del self.weights, self.weight_optimizer
            for name, weight in weights.items():
                weight.requires_grad_(False)
                weight.grad = None
                weight.data = original[name].to(weight.device)

    @property
    def trained_numbers(self) -> int:
        """Numbers that the job trains, of its adapter and of the backbone."""
        n_weights = sum(weight.numel() for weight in self.weights.values())
        return super().trained_numbers + n_weights

    def _list_rates(self, factors: Sequence[float]) -> dict[str, list[float]]:
        rates = {"lr_backbone": [self.variant.backbone_lr * factor for factor in factors]}
        return {**super()._list_rates(factors), **rates}

    def _update(self, factors: Sequence[float]) -> Tensor:
        """Clip adapter and weights by their common norm, then step both.

        A gradient that is not finite spoils both: the job, the only one of the wave, is given up.
        """
        weights = list(self.weights.values())
        norms = [job_optim.clip_jobs(self.adapter, None)[0], optim.gradient_norm(weights)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.config.optim.clip_norm is not None:
            parameters = [*self.adapter.parameters(), *weights]
            optim.clip_gradients(parameters, norm, self.config.optim.clip_norm)
        optim.set_rates(self.weight_optimizer, factors[0])
        for optimizer in (self.optimizer, self.weight_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        return norm[None]

    # -- files -----------------------------------------------------------------------------------

    def keep(self, number: int, folder: Path, *, backbone: dict[str, Any]) -> None:
        """Write adapter and weights, and remove the previous best ones."""
        super().keep(number, folder, backbone=backbone)
        write_weights(self.weights, folder / WEIGHTS)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old)
        log.info(
            "%s: best so far after step %d, %.1f MB of weights in %s",
            self.members[number].job.name,
            self.step,
            (folder / WEIGHTS).stat().st_size / 1e6,
            folder / WEIGHTS,
        )

    def kept(self, numbers: Sequence[int], folders: Sequence[Path]) -> Adapter:
        """Load the best adapter, and its weights into the model: the job has no steps left."""
        (folder,) = folders
        fill(self.weights, load_file(folder / WEIGHTS))
        return super().kept(numbers, folders)

    def publish(self, number: int, kept: Path, folder: Path, *, backbone: dict[str, Any]) -> None:
        """Move the best weights into place, then the adapter that belongs to them."""
        os.replace(kept / WEIGHTS, folder / WEIGHTS)
        super().publish(number, kept, folder, backbone=backbone)

    def copy(self, number: int, run: Path, *, backbone: dict[str, Any]) -> None:
        """Save nothing: optimizer and weights would take several times the backbone's space."""

    def _origin(self, number: int) -> dict[str, Any]:
        return {**super()._origin(number), "backbone": WEIGHTS}


@torch.no_grad()
def fill(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy values of the same names into the weights."""
    assert weights.keys() == values.keys()
    for name, weight in weights.items():
        weight.copy_(values[name])


def write_weights(weights: dict[str, nn.Parameter], file: Path) -> None:
    """Write named weights atomically."""
    partial = file.with_name(f".{file.name}.tmp")
    save_tensors({name: weight.detach().contiguous() for name, weight in weights.items()}, partial)
    put_in_place(partial, file)
