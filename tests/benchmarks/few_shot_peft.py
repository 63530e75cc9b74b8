"""PEFT and a plain training loop: the way of `few_shot_waves.py` that knows nothing of ours.

One stock adapter per job on the same loaded backbone, the library's optimizer, the model's own
loss, one job after another. PEFT's Poly always draws noise while it trains.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from few_shot_ways import CLIP_NORM, CPU, Bench
from torch import Tensor, nn

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.collapse import average
from mhr_scale.families.packed import IGNORE, EncodedRow
from mhr_scale.training.optim import rate_factor

Method = Literal["lora", "poly"]
#: The collator pads to the batch's longest row, rounded up to this.
PAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class PeftJob:
    """A job of the plain loop."""

    number: int
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    trained: list[nn.Parameter]


class PeftLoop:
    """One adapter per job, one job after another.

    `lora`: one low-rank pair per linear; `poly`: the inventory, mixed by PEFT's Poly.
    `many_tensors` asks torch for the AdamW that it takes on a GPU.
    """

    size = 1

    def __init__(
        self,
        bench: Bench,
        model: Any,
        *,
        method: Method,
        device: torch.device = CPU,
        many_tensors: bool | None = None,
    ) -> None:
        self.name = {"lora": "PEFT LoRA", "poly": "PEFT Poly"}[method]
        self.bench, self.model, self.method = bench, model, method
        self.device, self.many_tensors = device, many_tensors

    def open(self, numbers: Sequence[int]) -> PeftJob:
        """A new adapter in the backbone, with the job's tensors, and its optimizer."""
        from peft import LoraConfig, PolyConfig, get_peft_model

        (number,) = numbers
        is_causal = not self.model.config.is_encoder_decoder
        options: Any = {
            "task_type": "CAUSAL_LM" if is_causal else "SEQ_2_SEQ_LM",
            "r": 1,
            "target_modules": sorted({site.name.rpartition(".")[2] for site in self.bench.sites}),
        }
        config = LoraConfig(**options, lora_alpha=1, lora_dropout=0.0)
        if self.method == "poly":
            config = PolyConfig(**options, n_tasks=1, n_skills=8, n_splits=8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(self.model, config).train()
        if self.device.type != "meta":
            self._fill(model, self.bench.start(number))
        if self.bench.kind == "routing" and self.method == "poly":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("module_logits" in name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self._optimizer(trained)
        schedule = self.bench.schedule()
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(schedule, step)
        )
        return PeftJob(number, model, optimizer, scheduler, trained)

    def _fill(self, model: Any, adapter: Adapter) -> None:
        if self.method == "lora":
            single = average(adapter) if adapter.config.n_skills > 1 else adapter
            for name, tensor in single.inventory.named_tensors():
                linear, _, side = name.rpartition(".")
                layer = model.base_model.model.get_submodule(linear)
                getattr(layer, f"lora_{side}")["default"].weight.data.copy_(tensor[0, 0].T)
            return
        for name, tensor in adapter.inventory.named_tensors():
            linear, _, side = name.rpartition(".")
            layer = model.base_model.model.get_submodule(linear)
            getattr(layer, f"poly_lora_{side}")["default"].data.copy_(tensor)
            assert adapter.routing_logits is not None
            row = adapter.routing_logits.data[:, adapter.groups.index(linear)]
            layer.poly_router["default"].module_logits.data.copy_(row.flatten(1))

    def _optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        optim = self.bench.optim
        if optim.name == "adamw":
            return torch.optim.AdamW(
                trained,
                lr=optim.lr,
                betas=(optim.beta1, optim.beta2),
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                foreach=self.many_tensors,
            )
        from transformers.optimization import Adafactor

        return Adafactor(
            trained, lr=optim.lr, scale_parameter=True, relative_step=False, warmup_init=False
        )

    def step(self, job: PeftJob) -> list[float]:
        """One step of the job; returns its loss."""
        rows = self.bench.rows(job.number)
        is_causal = not self.model.config.is_encoder_decoder
        batch = collate(rows.batch(job.scheduler.last_epoch), self.device, is_causal=is_causal)
        if self.method == "poly":
            batch["task_ids"] = torch.zeros(len(batch["labels"]), dtype=torch.long).to(self.device)
        loss = job.model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(job.trained, CLIP_NORM)
        job.optimizer.step()
        job.scheduler.step()
        job.optimizer.zero_grad()
        return [loss.item()]

    def close(self, job: PeftJob) -> None:
        """Take the adapter out of the backbone."""
        job.model.unload()


def collate(
    rows: Sequence[EncodedRow], device: torch.device, *, is_causal: bool
) -> dict[str, Tensor]:
    """A batch for transformers' own loss, padded to the longest row, labels with -100.

    Of a causal model these stand in prompts, too.
    """

    def padded(lists: Sequence[Any], value: int) -> Tensor:
        width = -(-max(len(ids) for ids in lists) // PAD_MULTIPLE) * PAD_MULTIPLE
        array = np.full((len(lists), width), value, dtype=np.int64)
        for number, ids in enumerate(lists):
            array[number, : len(ids)] = ids
        return torch.from_numpy(array)

    inputs = [row.input_ids for row in rows]
    labels = [row.answers[0] for row in rows]
    if is_causal:
        prompts = [np.full_like(ids, IGNORE) for ids in inputs]
        inputs = [np.append(*pair) for pair in zip(inputs, labels, strict=True)]
        labels = [np.append(*pair) for pair in zip(prompts, labels, strict=True)]
    return {
        "input_ids": padded(inputs, 0).to(device),
        "attention_mask": padded([np.ones_like(ids) for ids in inputs], 0).to(device),
        "labels": padded(labels, IGNORE).to(device),
    }
