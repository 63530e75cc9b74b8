"""Faster parts of a frozen T5, put in place of transformers' own; weights and names stay.

Three switches of a backbone's settings; tests/benchmarks/README.md says what each saves and what it
changes in the logits:

fused_attention   bias and mask merged once per stack, not once per layer; q, k and v together
fused_gate        gelu's tanh form as one operation; backward computes it anew and keeps less
fused_norm        T5's norm as one operation, which keeps less (a single kernel on GPUs)

Shape letters: B rows, L tokens, H heads, K keys, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import create_position_bias_mask

from mhr_scale.families import aligned
from mhr_scale.families.family import Settings
from mhr_scale.families.flat import Flat, in_use
from mhr_scale.families.fused import fused_class, gated, rms_norm
from mhr_scale.families.siblings import call_together


def install(model: nn.Module, settings: Settings) -> None:
    """Exchange the classes of T5's attentions, gated feed-forwards and norms, as `settings` say.

    Before adapters are attached: they ask the modules which of their linears share an input.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("M")
        if kind != "UMT5Attention":  # which has a position bias in every layer, and hands none on
            kind = kind.removeprefix("UM")
        part: Any = None
        if kind == "T5Attention" and settings.fused_attention:
            part = CrossAttention if name.endswith("EncDecAttention") else SelfAttention
        elif kind == "T5DenseGatedActDense":
            part = GatedFeedForward
            is_tanh = type(module.act).__name__ in TANH_GELUS
            module.is_fused_gate = settings.fused_gate and is_tanh
        elif kind == "T5LayerNorm" and settings.fused_norm:
            part = Norm
        if part is not None:
            module.__class__ = fused_class(part, type(module))


#: transformers' classes of the activation that T5 v1.1 calls gelu_new.
TANH_GELUS = ("NewGELUActivation", "GELUTanh")


class Attention:
    """T5's attention: the additive mask is made by the first layer of a stack and handed on.

    Where transformers hands on the position bias (1, H, L, K), this hands on bias and mask in one
    (B, H, L, K), without bias (B or 1, 1, L or 1, K or 1). Always a tensor: ranks with and without
    padding then have the same graph, which sharding needs.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Self-attention, or attention over `key_value_states`; the second result is the mask."""
        seen = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        if key_value_states is None:
            q, k, v = map(self._heads, call_together(self, ("q", "k", "v"), hidden_states))
            if past_key_values is not None:
                own = getattr(past_key_values, "self_attention_cache", past_key_values)
                k, v = own.update(k, v, self.layer_idx)
        else:
            q = self._heads(self.q(hidden_states))
            k, v = self._cross(key_value_states, past_key_values)
        if position_bias is not None and not self.o.weight.requires_grad:
            # reentrant recomputation marks whatever a block hands on as in need of a gradient
            position_bias = position_bias.detach()
        is_cross = key_value_states is not None
        flat = in_use()
        if flat is not None:
            bias = position_bias
            out_BLHD, position_bias = self._attend_flat(flat, q, k, v, mask, bias, is_cross)
        else:
            if position_bias is None:
                position_bias = self._additive_mask(q, k, mask, seen, is_cross=is_cross)
            out_BLHD = self._attend(q, k, v, position_bias)
        return self.o(out_BLHD.flatten(2)), position_bias, None

    def _attend(self: Any, q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor) -> Tensor:
        """Attention of heads (B, H, L, D), as (B, L, H, D)."""
        out_BHLD = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=position_bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
        )
        return out_BHLD.transpose(1, 2)

    def _attend_flat(
        self: Any,
        flat: Flat,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None,
        is_cross: bool,
    ) -> tuple[Tensor, Tensor]:
        """The same of rows laid flat: (1, N, H, D). The masks of all parts are handed on as one."""
        of_q, of_k = flat.stream_of(q.shape[2]), flat.stream_of(k.shape[2])
        parts = list(zip(of_q.spread(q), of_k.spread(k), of_k.spread(v), strict=True))
        if position_bias is None:
            # once for all parts, whose number differs between ranks: its weight may be sharded
            longest = (max(heads[n].shape[2] for heads in parts) for n in range(2))
            bias = self._bias(q, *longest, seen=0)
            merged = [
                self._merged(bias[:, :, : q.shape[2], : k.shape[2]], q, k, piece, is_cross)
                for (q, k, _), piece in zip(parts, flat.masks_of(mask, of_q, of_k), strict=True)
            ]
            position_bias = aligned.join(merged)
        shapes = [
            (len(k), 1, 1, k.shape[2]) if is_cross else (*q.shape[:3], k.shape[2])
            for q, k, _ in parts
        ]
        merged = aligned.split(position_bias, shapes)
        outs = [self._attend(*heads, piece) for heads, piece in zip(parts, merged, strict=True)]
        return of_q.gather(outs), position_bias

    def _heads(self: Any, states_BLI: Tensor) -> Tensor:
        return states_BLI.unflatten(-1, (-1, self.key_value_proj_dim)).transpose(1, 2)

    def _cross(self: Any, states: Tensor, past: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's states, computed once where there is a cache."""
        if past is not None and past.is_updated.get(self.layer_idx):
            layer = past.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        k, v = map(self._heads, call_together(self, ("k", "v"), states))
        if past is not None:
            k, v = past.cross_attention_cache.update(k, v, self.layer_idx)
            past.is_updated[self.layer_idx] = True
        return k, v

    def _additive_mask(
        self: Any, q: Tensor, k: Tensor, mask: Tensor | None, seen: Any, *, is_cross: bool
    ) -> Tensor:
        bias = self._bias(q, q.shape[2], k.shape[2], seen=seen)
        return aligned.align(self._merged(bias, q, k, mask, is_cross))

    def _bias(self: Any, q: Tensor, n_queries: int, n_keys: int, *, seen: Any) -> Tensor:
        """The bias of positions (1, H, L, K), or zero."""
        if not self.has_relative_attention_bias:
            return q.new_zeros(1, 1, 1, 1)
        bias: Tensor = self.compute_bias(n_queries, n_keys, q.device, past_seen_tokens=seen)
        return bias

    def _merged(
        self: Any, bias: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, is_cross: bool
    ) -> Tensor:
        is_causal = self.is_causal and not is_cross and mask is None and q.shape[2] > 1
        merged: Tensor = create_position_bias_mask(bias, mask, is_causal, q, k)
        return merged


class SelfAttention(Attention):
    """Queries, keys and values read the same states."""

    shared_inputs = (("q", "k", "v"),)


class CrossAttention(Attention):
    """Keys and values read the encoder's states."""

    shared_inputs = (("k", "v"),)


class GatedFeedForward:
    """act(wi_0 x) * (wi_1 x), both products together, then wo."""

    shared_inputs = (("wi_0", "wi_1"),)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Feed-forward of hidden_states (B, L, d_model)."""
        gate, linear = call_together(self, ("wi_0", "wi_1"), hidden_states)
        hidden = gated(gate, linear, "tanh_gelu") if self.is_fused_gate else self.act(gate) * linear
        hidden = self.dropout(hidden)
        weight = self.wo.weight
        if isinstance(weight, Tensor) and weight.dtype not in (hidden.dtype, torch.int8):
            hidden = hidden.to(weight.dtype)
        return self.wo(hidden)


class Norm:
    """T5's norm: scaled by the root mean square, in float32 inside, no mean and no bias."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Normalised hidden_states (..., d_model)."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
