"""Fused parts of decoder-only backbones: found by rule, and the same as transformers' own."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mhr_scale.adapters import Adapter, AdapterConfig, attach, detach
from mhr_scale.adapters.linear import Siblings
from mhr_scale.config import BackboneConfig
from mhr_scale.families import causal_fused
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.fused import GATES, fused_class, gated, rms_norm
from mhr_scale.families.modes import set_recompute
from mhr_scale.families.packed import EncodedRow, Packed
from mhr_scale.families.siblings import SharesInputs
from mhr_scale.passes.losses import language_model

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
PLAIN = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
#: Fields, and what is exchanged in two blocks: attentions, gates (and which), norms.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, str | None, int]]] = {
    "llama": (PLAIN, (2, "silu", 5)),
    "qwen2": (PLAIN, (2, "silu", 5)),
    "qwen3": (GROUPED, (2, "silu", 9)),
    "gemma2": ({**GROUPED, "sliding_window": 8}, (2, "tanh_gelu", 9)),
    "gemma3_text": ({**GROUPED, "sliding_window": 8}, (2, "tanh_gelu", 13)),
    "olmo2": (PLAIN, (2, "silu", 9)),
    "granite": (PLAIN, (2, "silu", 5)),
    "phi3": ({**PLAIN, "pad_token_id": 0}, (0, "silu", 5)),
    "phi": (SIZES, (2, None, 0)),
    "opt": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, (2, None, 0)),
    "gpt_neox": (SIZES, (0, None, 0)),
    "qwen3_moe": ({**PLAIN, **EXPERTS}, (2, None, 9)),
}
del FAMILIES["opt"][0]["intermediate_size"]
ON = BackboneConfig(name="x")
TASKS = ("a", "b", "c")


def stock(family: str, dtype: torch.dtype = torch.float32) -> Any:
    config = CAUSAL.make_config({"model_type": family, **FAMILIES[family][0]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name in vars(module) if name.endswith("dropout")]:
            setattr(module, name, 0.0)
    return model.to(dtype).train().requires_grad_(False)


def fuse(model: Any, settings: BackboneConfig = ON) -> Any:
    fused = copy.deepcopy(model)
    CAUSAL.fuse(fused, settings)
    return fused


def rows(config: Any) -> Packed:
    random = np.random.default_rng(1)
    sizes = ((9, (3, 1)), (5, (2,)), (11, (1, 4)))
    given = [
        EncodedRow(random.integers(2, 64, n), tuple(random.integers(2, 64, m) for m in answers))
        for n, answers in sizes
    ]
    return CAUSAL.pack(given, config)


def adapt(model: Any, layout: str = "full") -> Adapter:
    config = AdapterConfig(layout=layout, n_skills=3, n_splits=4, rank=2)
    adapter = attach(model, config, tasks=TASKS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def step(model: Any, adapter: Adapter, packed: Packed) -> dict[str, Tensor]:
    """Logits, and the gradients of the adapter's tensors."""
    adapter.zero_grad(set_to_none=True)
    with adapter.slots([2, 0, 2]) as slots:
        logits_BDV = CAUSAL.logits(model, packed)
        slots.backward(language_model(logits_BDV, packed.labels_BD).sum.sum())
    found = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    return {**found, "logits": logits_BDV.detach()}


def norm_of(tensor: Tensor) -> float:
    return float(tensor.double().norm())


# -- what is exchanged, and that it is the same ----------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family_are_found_by_rule(family: str) -> None:
    modules = list(fuse(stock(family)).modules())
    kinds = [getattr(m, "gate_kind", None) for m in modules]
    gates = [kind for kind in kinds if kind is not None]
    attentions = [m for m in modules if "Attention" in type(m).__name__]
    together = sum(hasattr(m, "shared_inputs") for m in attentions)
    norms = sum(isinstance(m, causal_fused.Norm) for m in modules)
    expected, kind, n_norms = FAMILIES[family][1]
    assert (together, norms) == (expected, n_norms)
    assert gates == ([] if kind is None else [kind] * 2)


@pytest.mark.parametrize("layout", ["full", "light"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_stock_backbone(family: str, layout: str) -> None:
    model = stock(family)
    fused, packed = fuse(model), rows(model.config)
    found = [step(one, adapt(one, layout), packed) for one in (fused, model)]
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        assert norm_of(found[0][name] - expected) < 1e-5 * norm_of(expected), name


def test_switched_off_parts_stay_transformers_own() -> None:
    off = replace(ON, fused_attention=False, fused_gate=False, fused_norm=False)
    model = fuse(stock("qwen3"), off)
    kinds = Counter(type(m).__name__ for m in model.modules() if "Fused" in type(m).__name__)
    assert kinds == {"FusedQwen3MLP": 2}  # gate and up together
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_recomputation_changes_no_bit(mode: str) -> None:
    model = fuse(stock("qwen3"))
    packed = rows(model.config)
    adapter = adapt(model)
    expected = step(model, adapter, packed)
    set_recompute(model, mode)
    found = step(model, adapter, packed)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_backbone_that_trains_gets_all_its_gradients() -> None:
    model = stock("gemma3_text").requires_grad_(True)
    fused, packed = fuse(model), rows(model.config)
    for one in (fused, model):
        language_model(CAUSAL.logits(one, packed), packed.labels_BD).sum.sum().backward()
    for (name, mine), other in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert norm_of(mine.grad - other.grad) < 1e-5 * norm_of(other.grad), name


# -- linears of one input --------------------------------------------------------------------------


def test_siblings_may_be_of_unequal_widths_with_biases_or_without_an_adapter() -> None:
    model = fuse(stock("qwen2"))
    adapt(model, "light")
    found = [m for m in model.modules() if isinstance(m, Siblings)]
    shapes = [[(n.weight.shape[0], n.bias is not None) for n in one.members] for one in found]
    assert shapes == [[(32, True), (16, True), (16, True)], [(48, False), (48, False)]] * 2
    assert [len(list(one.adapted())) for one in found] == [2, 1] * 2
    detach(model)
    assert not any(isinstance(m, Siblings) for m in model.modules())


class Reader(nn.Module):
    """Reads one input with both linears, or two."""

    shared_inputs = (("q_proj", "k_proj"),)

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert self.k_proj.weight.shape == (2, 4)
        return self.q_proj(x), self.k_proj(x if other is None else other)


class Both(nn.Module):
    """Siblings that count how often they run."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members, self.calls = nn.ModuleList(members), 0

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return tuple(member(x) for member in self.members)


def test_another_input_is_another_call_and_nothing_stays_in_front_of_the_children() -> None:
    reader: Any = Reader()
    x, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = reader(x), reader(x, other)
    reader.__class__ = fused_class(SharesInputs, Reader)
    both = Both(reader.q_proj, reader.k_proj)
    reader.siblings_q_proj_k_proj = both
    for given, outputs, calls in (((x,), expected[0], 1), ((x, other), expected[1], 2)):
        both.calls = 0
        assert all(a.equal(b) for a, b in zip(reader(*given), outputs, strict=True))
        assert both.calls == calls
    with pytest.raises(RuntimeError):
        reader(torch.randn(2, 3))
    assert (reader.q_proj, reader.k_proj) == (*both.members,)


# -- gates and norms by themselves -----------------------------------------------------------------


class Scaled(nn.Module):
    """A gated feed-forward that is none of ours."""

    def __init__(self, *, factor: float = 1.0, dropout: float | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down_proj = nn.Linear(8, 8)
        self.factor = factor
        self.drop = nn.Identity() if dropout is None else nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.drop(hidden * self.factor))


@pytest.mark.parametrize(
    ("module", "kind"),
    [(Scaled(), "silu"), (Scaled(factor=1.01), None), (Scaled(dropout=0.0), None)],
    ids=["the same", "another factor", "dropout"],
)
def test_a_gate_is_exchanged_only_where_it_computes_the_same(module: Any, kind: str | None) -> None:
    roles = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "part": "feed_forward"}
    causal_fused._join_linears(module, roles, ON)
    assert getattr(module, "gate_kind", None) == kind
    assert module.shared_inputs == (("gate_proj", "up_proj"),)


class MeanNorm(nn.Module):
    """A norm that takes the mean off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), self.weight, eps=self.eps)


def test_another_norm_stays() -> None:
    norm = MeanNorm()
    causal_fused._fuse_norm(norm)
    assert type(norm) is MeanNorm


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_has_the_gradients_of_finite_differences_and_keeps_its_input(offset: float) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-3, offset=offset), x)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-3, offset=offset), F.rms_norm(x, (5,), weight + offset, 1e-3)
    )
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        rms_norm(x, weight, 1e-3, offset=offset)
    assert kept == [(3, 5), (3, 1)]


@pytest.mark.parametrize("kind", GATES)
def test_a_gate_has_the_gradients_of_finite_differences(kind: str) -> None:
    given = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda gate, up: gated(gate, up, kind), given)


# -- heads: of attention, and of the model ---------------------------------------------------------


def test_shared_heads_are_not_copied_and_give_the_same_bits() -> None:
    model = stock("llama", torch.bfloat16)
    attention = model.model.layers[0].self_attn
    shape = (2, 16, 4, 8)
    query = torch.randn(shape).bfloat16().transpose(1, 2)
    key, value = (torch.randn(2, 2, 16, 8).bfloat16() for _ in range(2))
    mask = torch.zeros(2, 1, 16, 16).bfloat16()
    mask[:, :, ~torch.ones(16, 16).tril().bool()] = torch.finfo(torch.bfloat16).min
    given = (attention, query, key, value, mask)
    ours = causal_fused.grouped_attention(*given, scaling=0.3)[0]
    theirs = causal_fused.sdpa_attention_forward(*given, scaling=0.3)[0]
    assert ours.equal(theirs)


class Seen(TorchDispatchMode):
    """Names of what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_head_gives_the_logits_of_targets_without_repeating_its_weight() -> None:
    model = stock("llama")
    packed = rows(model.config)
    with Seen() as seen:
        logits_BDV = CAUSAL.logits(model, packed)
    assert logits_BDV.shape == (*packed.labels_BD.shape, 64)
    assert "bmm" not in seen.names
