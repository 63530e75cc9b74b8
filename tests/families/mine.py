"""A small encoder-decoder of another family than T5: other names, biases, late norms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhr_scale.families.encoder_decoder import EncoderDecoder
from mhr_scale.families.named import BlockPattern, Named, below


@dataclass
class MineConfig:
    """Sizes, under names that T5 does not use."""

    model_type: str = "mine"
    width: int = 32
    hidden: int = 48
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 3
    vocab_size: int = 64
    pad_token_id: int = 1


class Attention(nn.Module):
    """Attention whose linears are called query, key, value and out."""

    def __init__(self, config: MineConfig) -> None:
        super().__init__()
        self.heads = config.heads
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(config.width, config.width))

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        """What x sees of `other`; `mask` (B, 1, 1 or L, K) is boolean or added."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(x), self.key(other), self.value(other))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self-attention, in a decoder attention over the encoder's states, and fc1 and fc2."""

    def __init__(self, config: MineConfig, *, is_decoder: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config) if is_decoder else None
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2 + is_decoder))

    def forward(
        self, x: Tensor, mask: Tensor, states: Tensor | None, states_mask: Tensor
    ) -> Tensor:
        """One layer; norms come after the sums."""
        norms = iter(self.norms)
        x = next(norms)(x + self.self_attn(x, x, mask))
        if self.cross_attn is not None:
            x = next(norms)(x + self.cross_attn(x, states, states_mask))
        return next(norms)(x + self.fc2(F.relu(self.fc1(x))))


class Stack(nn.Module):
    """Encoder or decoder."""

    def __init__(self, config: MineConfig, n_layers: int, *, is_decoder: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, is_decoder=is_decoder) for _ in range(n_layers))

    def forward(self, x: Tensor, mask: Tensor, states: Any, states_mask: Tensor) -> Tensor:
        """All layers."""
        for layer in self.layers:
            x = layer(x, mask, states, states_mask)
        return x


class Mine(nn.Module):
    """The whole model; called like T5ForConditionalGeneration with inputs, mask and labels."""

    def __init__(self, config: MineConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(64, config.width)
        self.encoder = Stack(config, config.encoder_layers, is_decoder=False)
        self.decoder = Stack(config, config.decoder_layers, is_decoder=True)

    def get_input_embeddings(self) -> nn.Embedding:
        """What turns token ids into states, in both stacks."""
        return self.words

    def get_encoder(self) -> Callable[..., SimpleNamespace]:
        """What reads inputs alone."""
        return self._encode

    def _embed(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places.weight[: ids.shape[1]]

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask.bool()[:, None, None]
        states = self.encoder(self._embed(input_ids), mask, None, mask)
        return SimpleNamespace(last_hidden_state=states)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """Logits behind the decoder's inputs, or loss and logits of the labels.

        Each position sees those before it, or what `decoder_attention_mask` lets it see.
        """
        states = self._encode(input_ids, attention_mask).last_hidden_state
        if labels is not None:
            decoder_input_ids = F.pad(labels[:, :-1].clamp(min=0), (1, 0))
        x = self._embed(decoder_input_ids)
        mask = decoder_attention_mask
        if mask is None:
            mask = torch.ones(2 * x.shape[1:2], dtype=torch.bool).tril()
        x = self.decoder(x, mask, states, attention_mask.bool()[:, None, None])
        logits = x @ self.words.weight.T
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def make_mine(**changes: Any) -> Mine:
    """A model with random weights, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mine(MineConfig(**changes))


class MineFamily(Named, EncoderDecoder):
    """What the package asks about it."""

    def make_config(self, fields: Mapping[str, Any]) -> MineConfig:
        return MineConfig(**fields)

    def check_config(self, config: MineConfig, place: str) -> None:
        """All sizes are good."""

    def model_class(self, config: MineConfig) -> type[Mine]:
        return Mine

    def find_ties(
        self, raw: Mapping[str, Any], names: frozenset[str], are_equal: Callable[[str, str], bool]
    ) -> dict[str, str]:
        return {}

    def random_weight(
        self,
        config: MineConfig,
        name: str,
        shape: tuple[int, ...],
        generator: torch.Generator,
    ) -> Tensor:
        return torch.empty(shape).normal_(generator=generator)

    def start_id(self, config: MineConfig) -> int:
        return 0


ATTENTION = ("query", "key", "value", "out")
WIDE = ("fc1", "fc2")
FAMILY = MineFamily(
    name="Mine",
    model_types=("mine",),
    patterns={
        "encoder": BlockPattern(
            name="encoder.layers",
            depth="encoder_layers",
            sublayers=(below("self_attn", ATTENTION), WIDE),
        ),
        "decoder": BlockPattern(
            name="decoder.layers",
            depth="decoder_layers",
            sublayers=(below("self_attn", ATTENTION), below("cross_attn", ATTENTION), WIDE),
        ),
    },
    layouts={
        "full": (*ATTENTION, *WIDE),
        "light": ("key", "value", "fc1"),
        "attention": ATTENTION,
    },
    inputs={"out": "value", "fc2": "fc1"},
)
