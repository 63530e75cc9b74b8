"""Faster parts of a frozen decoder-only backbone, found by rule; weights and names stay.

No model type is known here. Linears are told by their roles (`linear_names`); what a module
computes is asked of its own forward, run on a few numbers with attributes that stand in front of
its linears and weights. Where the answer is another one, the module stays as it is.

shared inputs     q, k and v, gate and up run together where adapters are attached
fused_attention   of those q, k and v; keys and values of shared heads are not copied on CPUs
fused_gate        act(gate) * up as one operation; backward computes it anew and keeps less
fused_norm        RMS norms as one operation that keeps less, scaled by weight or 1 + weight

Shape letters: B rows, L positions, N heads, K heads of keys and values, D width of a head.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mhr_scale.families import varlen
from mhr_scale.families.family import Blocks, Settings
from mhr_scale.families.flat import apart, in_use
from mhr_scale.families.fused import GATES, fused_class, gated, is_on_cpu, rms_norm
from mhr_scale.families.linear_modules import find_widths
from mhr_scale.families.linear_names import is_of_experts, part_of, role_of
from mhr_scale.families.siblings import SharesInputs, call_together

#: Roles of linears that read the same input, in the order in which they run.
TOGETHER = {
    "attention": ("query", "key", "value"),
    "cross_attention": ("key", "value"),
    "feed_forward": ("gate", "up"),
}
#: What files of transformers call it.
EAGER = "eager_attention_forward"
#: The names of our attentions among those of transformers, by that which each takes the place of.
OURS = {"sdpa": "grouped_sdpa", "eager": "own_eager"}
#: How near a part has to come to the original, in float32, to take its place.
TOLERANCE = 1e-5


def install(
    model: Any,
    blocks: Mapping[str, Blocks],
    norms: list[nn.Module],
    settings: Settings,
) -> None:
    """Exchange the classes of attentions, gated feed-forwards and norms, as `settings` say.

    Before adapters are attached: they ask the modules which of their linears share an input.
    """
    for stack in blocks.values():
        for name in stack.list_modules():
            block = model.get_submodule(name)
            for place, module in block.named_modules():
                _join_linears(module, _roles_in(module, place), settings)
    is_exchangeable = model._supports_attention_backend  # others know classes by name only
    kind = model.config._attn_implementation
    if settings.fused_attention and is_exchangeable and kind in OURS:
        model.config._attn_implementation = _register_attention(kind)
    if settings.fused_norm:
        for norm in norms:
            _fuse_norm(norm)


def _roles_in(module: nn.Module, place: str) -> dict[str, str]:
    """The names of a module's linears by their role; experts apart."""
    roles = {}
    for child, linear in module.named_children():
        name = f"{place}.{child}"
        role = None if is_of_experts(name) or find_widths(linear) is None else role_of(name)
        if role is not None:
            roles[role] = child
    if roles:
        roles["part"] = part_of(f"{place}.")
    return roles


def _join_linears(module: Any, roles: Mapping[str, str], settings: Settings) -> None:
    """Let linears of one input run together, and a gate be one operation with what it gates."""
    part = roles.get("part")
    if part is None or (part != "feed_forward" and not settings.fused_attention):
        return
    if settings.fused_gate and part == "feed_forward":
        kind = _find_gate(module, roles)
        if kind is not None:
            module.gate_kind = kind
            module.gate_linears = tuple(roles[r] for r in ("gate_up", "gate", "up") if r in roles)
            module.down_linear = roles["down"]
            if "gate" in roles:
                module.shared_inputs = (module.gate_linears,)
            module.__class__ = fused_class(GatedFeedForward, type(module))
            return
    shared = tuple(roles[role] for role in TOGETHER[part] if role in roles)
    if len(shared) > 1 and len({_n_in(module, name) for name in shared}) == 1:
        module.shared_inputs = (shared,)
        module.__class__ = fused_class(SharesInputs, type(module))


def _n_in(module: nn.Module, name: str) -> int:
    widths = find_widths(module.get_submodule(name))
    assert widths is not None
    return widths[0]


# -- attention -------------------------------------------------------------------------------------


def _register_attention(kind: str) -> str:
    """The name by which transformers knows the attention in place of `kind`, which masks it has."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    attention, mask = {
        "sdpa": (flat_attention, sdpa_mask),
        "eager": (apart(own_eager), eager_mask),
    }[kind]
    AttentionInterface.register(OURS[kind], attention)
    AttentionMaskInterface.register(OURS[kind], mask)
    return OURS[kind]


def own_eager(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The attention that a model's own file writes out, as with capped scores."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    attention = next(file for file in files if hasattr(file, EAGER))
    found: tuple[Tensor, Any] = getattr(attention, EAGER)(module, *args, **kwargs)
    return found


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, but under a mask on CPUs too keys and values of shared heads stay one.

    query (B, N, L, D), key and value (B, K, L, D); the result is (B, L, N, D).
    """
    is_plain = all(kwargs.get(name) is None for name in ("softcap", "cache", "position_bias"))
    is_long = query.shape[2] > 1 and attention_mask is not None
    if not (is_plain and is_long and is_on_cpu(query)):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
        return found
    out_BNLD = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out_BNLD.transpose(1, 2).contiguous(), None


def flat_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`grouped_attention` of padded rows, and of rows laid flat as `flat` and `varlen` have it."""
    flat = in_use()
    if flat is not None and varlen.fits(module, flat, query, dropout=dropout, options=kwargs):
        window = kwargs.get("sliding_window")
        return varlen.attend(flat, query, key, value, scaling=scaling, window=window), None
    found: tuple[Tensor, None] = apart(grouped_attention)(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return found


# -- gated feed-forwards ---------------------------------------------------------------------------


class GatedFeedForward:
    """down(act(gate x) * (up x)), both products together; gate and up may be one linear."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Feed-forward of x (B, L, hidden)."""
        if len(self.gate_linears) == 1:
            gate, up = getattr(self, self.gate_linears[0])(x).chunk(2, dim=-1)
        else:
            gate, up = call_together(self, self.gate_linears, x)
        return getattr(self, self.down_linear)(gated(gate, up, self.gate_kind))


def _find_gate(module: nn.Module, roles: Mapping[str, str]) -> str | None:
    """The activation with which a module computes what `GatedFeedForward` does; None: it does not.

    One with dropout or with settings of a call does not, whatever it gives.
    """
    if "down" not in roles or not ("gate_up" in roles or {"gate", "up"} <= roles.keys()):
        return None
    n_given = len(inspect.signature(type(module).forward).parameters) - 1
    if n_given != 1 or any(isinstance(part, nn.Dropout) for part in module.modules()):
        return None
    gate, up = torch.linspace(-6.0, 6.0, 64)[None, None], torch.linspace(2.0, -3.0, 64)[None, None]
    shown: dict[str, Any] = {roles["down"]: lambda hidden: hidden}
    if "gate_up" in roles:
        shown[roles["gate_up"]] = lambda _: torch.cat((gate, up), -1)
    else:
        shown |= {roles["gate"]: lambda _: gate, roles["up"]: lambda _: up}
    found = _ask(module, shown, torch.zeros(1, 1, 8))
    if found is None:
        return None
    near = (kind for kind, (act, _) in GATES.items() if _is_near(found, act(gate) * up))
    return next(near, None)


# -- norms -----------------------------------------------------------------------------------------


class Norm:
    """A norm by the root mean square, in float32 inside, no mean and no bias."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Normalised hidden_states (..., width)."""
        return rms_norm(hidden_states, self.weight, self.norm_epsilon, offset=self.norm_offset)


def _fuse_norm(module: Any) -> None:
    """Exchange the class of a norm whose only parameter scales what the root mean square leaves."""
    epsilons = {v for n, v in vars(module).items() if "eps" in n and isinstance(v, float)}
    names = [name for name, _ in module.named_parameters()]
    is_torch = type(module).__module__.startswith("torch.")
    if names != ["weight"] or len(epsilons) != 1 or isinstance(module, Norm) or is_torch:
        return
    (epsilon,) = epsilons
    weight = torch.linspace(0.5, -1.5, 8)
    # one row of the usual size, and one so small that the epsilon tells
    x = torch.linspace(-2.0, 3.0, 8) * torch.tensor([[1.0], [epsilon**0.5]])
    found = _ask(module, {"weight": weight}, x)
    if found is None:
        return
    for offset in (0.0, 1.0):
        if _is_near(found, rms_norm(x, weight, epsilon, offset=offset)):
            module.norm_epsilon, module.norm_offset = epsilon, offset
            module.__class__ = fused_class(Norm, type(module))
            return


# -- asking a module -------------------------------------------------------------------------------


def _ask(module: nn.Module, shown: Mapping[str, Any], x: Tensor) -> Tensor | None:
    """What a module's own forward makes of x with attributes in front of its own; None: nothing.

    Its weights are not read: they may be on no device, or cut.
    """
    with _showing(module, shown), torch.device("cpu"), torch.no_grad():
        try:
            found = module.forward(x)
        except Exception:  # of another form than asked for
            return None
    return found if isinstance(found, Tensor) else None


@contextmanager
def _showing(module: nn.Module, shown: Mapping[str, Any]) -> Iterator[None]:
    own = vars(module)
    own.update(shown)
    try:
        yield
    finally:
        for name in shown:
            del own[name]


def _is_near(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=TOLERANCE, atol=TOLERANCE
    )
