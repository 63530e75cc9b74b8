"""Tiny backbones and single linears whose adapters have no trivial tensor left."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from device_waits import READS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, attach
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.adapters.sites import Site

TASKS = ("copy", "reverse", "sort", "count")


def make_t5(**changes: Any) -> T5ForConditionalGeneration:
    """A T5 v1.1 with two blocks a side and random weights, always the same ones."""
    config = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**{**config, **changes}))


def randomise(adapter: Adapter, *, seed: int = 0) -> Adapter:
    """Give every trainable tensor values that tell tasks, skills and splits apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name == "routing_logits":
            parameter.data.copy_(noise * 2.0)
        elif adapter.config.kind == "ia3":
            parameter.data.copy_(1.0 + 0.3 * noise)
        else:
            parameter.data.copy_(0.3 * noise)
    return adapter


def make_adapted(
    config: AdapterConfig,
    *,
    tasks: Sequence[str] = TASKS,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> tuple[nn.Module, Adapter]:
    """A tiny T5 in training mode with a randomised adapter, both of `dtype` on `device`."""
    model = make_t5(**changes).to(device, dtype).train()
    adapter = attach(model, config, tasks=tasks).to(dtype)
    return model, randomise(adapter)


def make_linear(
    config: AdapterConfig,
    *,
    n_in: int,
    n_out: int,
    tasks: Sequence[str] = TASKS,
    dtype: torch.dtype = torch.float64,
) -> Adapter:
    """A randomised adapter of one linear; `adapter.linears[0]` is the linear."""
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(n_in, n_out, bias=False)
    base.weight.data = torch.randn(n_out, n_in, generator=generator, dtype=dtype) / n_in**0.5
    base.requires_grad_(False)
    site = Site(
        name="linear", in_features=n_in, out_features=n_out, stack="encoder", block=0, sublayer=0
    )
    adapter = Adapter(config, (site,), task_names=tasks).to(dtype)
    adapter.linears.append(AdaptedLinear(base, "linear"))
    return randomise(adapter)


def tensors_of(adapter: Adapter, *, gradients: bool = False) -> dict[str, Tensor]:
    """Dense copies of all trainable tensors, or of their gradients, by parameter name."""
    found = {}
    for name, parameter in adapter.named_parameters():
        tensor = parameter.grad if gradients else parameter.detach()
        if tensor is not None:
            found[name] = tensor.to_dense() if tensor.is_sparse else tensor.clone()
    return found


def attach_copy(model: nn.Module, adapter: Adapter) -> Adapter:
    """Attach a new adapter with the tensors of `adapter` to `model`."""
    like = next(adapter.parameters())
    copied = attach(model, adapter.config, tasks=adapter.task_names).to(like.dtype)
    artefact.load_tensors(copied, artefact.named_tensors(adapter), place="the other adapter")
    return copied


def make_batch(n_rows: int, *, n_inputs: int = 7, n_targets: int = 5, seed: int = 0) -> dict:
    """Inputs, some of them padded, and targets; a row's tokens do not depend on `n_rows`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 64, (n_rows, n_inputs + n_targets), generator=generator)
    input_ids, labels = (part.contiguous() for part in tokens.split([n_inputs, n_targets], dim=1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[::2, -2:] = 0
    labels[::2, -1:] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batch_for(model: Any, n_rows: int, **options: Any) -> dict[str, Tensor]:
    """The same (`make_batch`) on the model's device."""
    device = next(model.parameters()).device
    return {name: t.to(device) for name, t in make_batch(n_rows, **options).items()}


def gradients(
    model: nn.Module, adapter: Adapter, task_ids: Sequence[int], *, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Gradients of one step on a fixed batch; the adapter's own are cleared again."""
    batch = batch_for(model, len(task_ids), seed=seed)
    with adapter.slots(task_ids, **options) as slots:
        slots.backward(model(**batch).loss)
    found = tensors_of(adapter, gradients=True)
    adapter.zero_grad()
    return found


def logits(
    model: nn.Module, adapter: Adapter, task_ids: Sequence[int | str], **options: Any
) -> Tensor:
    """Logits of a fixed batch without gradients."""
    batch = batch_for(model, len(task_ids))
    with torch.no_grad(), adapter.slots(task_ids, **options):
        return model(**batch).logits


class Recorder(TorchDispatchMode):
    """Every operation dispatched inside the block, and the shapes of its results."""

    #: Operations whose result the host has to wait for.
    SYNCS = READS
    #: Operations that neither launch a kernel nor move a byte, beside views.
    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")
    DRAWS = ("rand", "randn", "randint", "uniform_", "normal_", "bernoulli", "bernoulli_")

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run the operation and write it down."""
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        self.operations[name] += 1
        self.kernels[name] += not (operation.is_view or name in self.FREE)
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.shapes.add(tuple(part.shape))
        return result

    def count(self, names: Sequence[str]) -> int:
        """How many of the named operations ran."""
        return sum(self.operations[name] for name in names)
