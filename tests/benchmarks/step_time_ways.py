"""What `step_time.py` compares: ways of one forward and backward pass over the same frozen T5.

All ways share the weights of one backbone; each has modules of its own around them. Shape letters:
B rows, L tokens, I and O features, R rank, T tasks, Q splits, S skills.
"""

import copy
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhr_scale.adapters import AdapterConfig, attach, linear
from mhr_scale.config import BackboneConfig, OptimConfig
from mhr_scale.families import t5_fused
from mhr_scale.families.modes import set_recompute
from mhr_scale.training.optim import make_optimizer

LINEARS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
SWITCHES = ("attention", "gate", "norm")
N_TASKS = 313
CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 2048,
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 6,
    "num_heads": 8,
}
XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
SHAPES = {
    "tiny": {**SMALL, "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1},
    "small": SMALL,
    "xxl": XXL,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Backbone and batch: `rows` examples of as many tasks, the shorter half padded by a fifth."""

    model: str = "small"
    rows: int = 8
    tokens: int = 128
    targets: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU
    updates: bool = False
    """Whether a step has the optimizer's pass too: ours Adafactor, PEFT's torch's AdamW."""

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Distinct tasks out of all, one per row."""
        return tuple((5 + 37 * row) % N_TASKS for row in range(self.rows))

    def batch(self) -> dict[str, Tensor]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(1)
        top = SHAPES[self.model]["vocab_size"]
        inputs = torch.randint(3, top, (self.rows, self.tokens), generator=generator)
        labels = torch.randint(3, top, (self.rows, self.targets), generator=generator)
        mask = torch.ones_like(inputs)
        mask[::2, -(self.tokens // 5) :] = 0
        given = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self.device) for name, tensor in given.items()}


def build_t5(setting: Setting) -> Any:
    """A frozen T5 v1.1 of random weights, made where it stays; its norms tell too."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **SHAPES[setting.model],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    model = model.to(setting.dtype).to_empty(device=setting.device)
    model.tie_weights()
    randomise(model)
    return model.train().requires_grad_(False)


def randomise(model: Any) -> None:
    """Random weights, made where they lie, that keep activations in their range."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2)
        else:
            # queries are not scaled in T5: its own initialisation makes them that much smaller
            is_query = name.endswith(".q.weight")
            width = parameter.shape[-1] * (model.config.d_kv if is_query else 1)
            is_embedding = "shared" in name or "embed_tokens" in name
            parameter.data.normal_(0.0, 1.0 if is_embedding else width**-0.5)


def same_weights(model: Any) -> Any:
    """The modules of a model anew, around the very weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def fuse(model: Any, *names: str) -> Any:
    """The same weights with the named parts fused."""
    fused = same_weights(model)
    parts: dict[str, Any] = {f"fused_{name}": name in names for name in SWITCHES}
    t5_fused.install(fused, BackboneConfig(name="x", **parts))
    return fused


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way: `forward` gives the loss, `backward` takes it, `clear` forgets the gradients."""

    name: str
    model: Any
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    clear: Callable[[], None]
    around: Callable[[], Any] = nullcontext
    n_linears: int = 0
    update: Callable[[], object] | None = None

    def step(self) -> None:
        """One forward and backward pass, and the optimizer's if it has one."""
        with self.around():
            self.backward(self.forward())
        if self.update is not None:
            self.update()
        self.clear()


# -- frozen ----------------------------------------------------------------------------------------


def frozen(name: str, model: Any, setting: Setting, *, recompute: str = "none") -> Way:
    """The backbone alone; gradients pass through it to the embedded inputs of both stacks."""
    set_recompute(model, recompute)
    batch = setting.batch()
    embed = model.get_input_embeddings()
    inputs = embed(batch["input_ids"]).requires_grad_()
    targets = embed(model._shift_right(batch["labels"])).requires_grad_()

    def forward() -> Tensor:
        loss: Tensor = model(
            inputs_embeds=inputs,
            decoder_inputs_embeds=targets,
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            use_cache=False,
        ).loss
        return loss

    def clear() -> None:
        inputs.grad = targets.grad = None

    return Way(name=name, model=model, forward=forward, backward=Tensor.backward, clear=clear)


# -- ours ------------------------------------------------------------------------------------------


def ours(
    name: str,
    model: Any,
    setting: Setting,
    config: AdapterConfig,
    *,
    loss_of: Callable[[Any], Tensor],
    around: Any = nullcontext,
) -> Way:
    """Our adapter: slots are filled in `forward`, mixed gradients delivered in `backward`."""
    adapter = attach(model, config, tasks=[f"task {number}" for number in range(N_TASKS)])
    adapter.to(setting.device)
    adapter.row_gradients = True
    update = make_optimizer(adapter, OptimConfig()).step if setting.updates else None
    filled: list[Any] = []

    def forward() -> Tensor:
        filled.append(adapter.slots(setting.task_ids))
        filled[0].__enter__()
        return loss_of(model)

    def backward(loss: Tensor) -> None:
        slots = filled.pop()
        slots.backward(loss)
        slots.__exit__(None, None, None)

    def clear() -> None:
        for parameter in adapter.parameters():
            parameter.grad = None

    return Way(
        name=name,
        model=nn.ModuleList([model, adapter]),
        forward=forward,
        backward=backward,
        clear=clear,
        around=around,
        n_linears=len(adapter.linears),
        update=update,
    )


def plain_products(
    x: Tensor,
    a_UIX: Tensor,
    b_URO: Sequence[Tensor | None],
    frozen: Sequence[tuple[Tensor, Tensor | None]],
    *,
    by: object,
    cut: object,
) -> tuple[Tensor, ...]:
    """`products` of equally many rows a slot as autograd's own operations, one after the other."""
    slots = 1 if a_UIX.dim() == 2 else a_UIX.shape[0]
    hidden = x.reshape(slots, -1, x.shape[-1]) @ a_UIX
    ranks = [b.shape[-2] for b in b_URO if b is not None]
    columns = iter(hidden.split(ranks, -1))
    ys = []
    for (weight, bias), b in zip(frozen, b_URO, strict=True):
        y = F.linear(x, weight, bias)
        ys.append(y if b is None else y + (next(columns) @ b).reshape(y.shape))
    return tuple(ys)


@contextmanager
def without_function() -> Iterator[None]:
    """Adapted linears as plain operations inside the block."""
    with mock.patch.object(linear.products, "products", plain_products):
        yield


# -- others ----------------------------------------------------------------------------------------


def peft(name: str, model: Any, setting: Setting, kind: str, *, is_float32: bool = True) -> Way:
    """Stock PEFT. Its adapters are in float32 by default, and x with them, linear by linear."""
    from peft import LoraConfig, PolyConfig, get_peft_model

    options: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "r": 1, "target_modules": [*LINEARS]}
    config: Any = LoraConfig(**options)
    if kind == "poly":
        config = PolyConfig(**options, n_tasks=N_TASKS, n_skills=8, n_splits=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=is_float32).train()
    wrapped.to(setting.device)
    batch: dict[str, Any] = {**setting.batch(), "use_cache": False}
    if kind == "poly":
        batch["task_ids"] = torch.tensor(setting.task_ids, device=setting.device)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return plain_way(name, wrapped, lambda: wrapped(**batch).loss, trained, setting)


class Mixing(nn.Module):
    """The paper's adapted linear, stated anew: A and B mixed per example, in every linear."""

    task_ids: Tensor

    def __init__(self, base: nn.Linear, *, n_skills: int = 8, n_splits: int = 8) -> None:
        super().__init__()
        self.base = base
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        sides = (n_splits, n_skills)
        self.logits_TQS = nn.Parameter(torch.zeros(N_TASKS, *sides, **like))
        self.a_QSIR = nn.Parameter(torch.randn(*sides, base.in_features // n_splits, 1, **like))
        self.b_QSRO = nn.Parameter(torch.zeros(*sides, 1, base.out_features // n_splits, **like))

    def forward(self, x_BLI: Tensor) -> Tensor:
        """W x + x A B with matrices of each example's own."""
        w_BQS = torch.sigmoid(self.logits_TQS[self.task_ids])
        w_BQS = w_BQS / (w_BQS.sum(-1, keepdim=True) + 1e-12)
        a_BIR = torch.einsum("bqs,qsir->bqir", w_BQS, self.a_QSIR).flatten(1, 2)
        b_BRO = torch.einsum("bqs,qsro->brqo", w_BQS, self.b_QSRO).flatten(2, 3)
        result: Tensor = self.base(x_BLI) + x_BLI.bmm(a_BIR).bmm(b_BRO)
        return result

    @property
    def weight(self) -> Tensor:
        """The frozen weight: T5's feed-forward reads its type."""
        return self.base.weight


def reference(name: str, model: Any, setting: Setting) -> Way:
    """Every linear mixes for itself, example by example, in the backbone's data type."""
    trained: list[nn.Parameter] = []
    Mixing.task_ids = torch.tensor(setting.task_ids, device=setting.device)
    for parent in list(model.modules()):
        for child in LINEARS:
            if isinstance(getattr(parent, child, None), nn.Linear):
                mixing = Mixing(getattr(parent, child))
                setattr(parent, child, mixing)
                trained += [mixing.logits_TQS, mixing.a_QSIR, mixing.b_QSRO]
    batch = setting.batch()
    return plain_way(name, model, lambda: model(**batch, use_cache=False).loss, trained, setting)


def plain_way(
    name: str,
    model: Any,
    forward: Callable[[], Tensor],
    trained: Sequence[nn.Parameter],
    setting: Setting,
) -> Way:
    """One whose gradients autograd leaves in the trained parameters."""
    update = torch.optim.AdamW(trained).step if setting.updates else None

    def clear() -> None:
        for parameter in trained:
            parameter.grad = None

    return Way(
        name=name,
        model=model,
        forward=forward,
        backward=Tensor.backward,
        clear=clear,
        update=update,
    )


# -- all of them -----------------------------------------------------------------------------------

#: What makes a way of a name.
Maker = Callable[[str], Way]
#: Ways that others are compared with.
BASES = ("frozen stock", "frozen fused", "PEFT LoRA", "PEFT Poly")


def all_ways(model: Any, setting: Setting, names: Container[str] | None = None) -> list[Way]:
    """Every way, or those of these names, around the weights of one backbone."""
    mhr8 = {"n_skills": 8, "n_splits": 8}

    def bare() -> Any:
        return same_weights(model)

    def fused() -> Any:
        return fuse(model, *SWITCHES)

    batch = setting.batch()

    def loss(one: Any) -> Tensor:
        found: Tensor = one(**batch, use_cache=False).loss
        return found

    def still(make: Callable[[], Any], **options: Any) -> Maker:
        return lambda name: frozen(name, make(), setting, **options)

    def mine(make: Callable[[], Any], *, around: Any = nullcontext, **options: Any) -> Maker:
        config = AdapterConfig(rank=1, **options)
        return lambda name: ours(name, make(), setting, config, loss_of=loss, around=around)

    def theirs(kind: str, **options: Any) -> Maker:
        return lambda name: peft(name, bare(), setting, kind, **options)

    makers: dict[str, Maker] = {
        "frozen stock": still(bare),
        "frozen fused": still(fused),
        **{f"frozen, {one} alone": still(partial(fuse, model, one)) for one in SWITCHES},
        "frozen stock, recomputing": still(bare, recompute="non_reentrant"),
        "frozen fused, recomputing": still(fused, recompute="non_reentrant"),
        "LoRA": mine(fused, n_skills=1),
        "Poly": mine(fused, n_skills=8),
        "MHR 8": mine(fused, **mhr8),
        "MHR 64": mine(fused, n_skills=8, n_splits=64),
        "MHR 8, stock T5": mine(bare, **mhr8),
        "MHR 8, plain autograd": mine(fused, around=without_function, **mhr8),
        "PEFT LoRA": theirs("lora"),
        "PEFT LoRA, bf16": theirs("lora", is_float32=False),
        "PEFT Poly": theirs("poly"),
        "PEFT Poly, bf16": theirs("poly", is_float32=False),
        "reference": lambda name: reference(name, bare(), setting),
    }
    return made(makers, names)


def made(makers: Mapping[str, Maker], names: Container[str] | None) -> list[Way]:
    """The ways of these names, or all."""
    return [make(name) for name, make in makers.items() if names is None or name in names]
