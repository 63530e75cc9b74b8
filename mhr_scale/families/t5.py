"""T5, mT5 and umT5: names of their linears, their configuration, ties, weights and start token."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mhr_scale.errors import BackboneError, did_you_mean, first_line
from mhr_scale.families.encoder_decoder import EncoderDecoder
from mhr_scale.families.family import Blocks, Settings, last_part
from mhr_scale.families.model_configs import config_class
from mhr_scale.families.named import BlockPattern, Named, below
from mhr_scale.families.packed import Packed
from mhr_scale.families.stored_names import Arrangement, Stored

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
#: Names that are the embedding by definition of the architecture.
EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
#: The tokens for padding and for the end of a text, where a configuration says none.
PAD, END = 0, 1
#: Settings of T5Config that have to be at least 1, and the largest that any T5 could have.
SIZES = {
    "vocab_size": 1 << 24,
    "d_model": 1 << 20,
    "d_kv": 1 << 20,
    "d_ff": 1 << 20,
    "num_layers": 1000,
    "num_decoder_layers": 1000,
    "num_heads": 1 << 16,
    "relative_attention_num_buckets": 1 << 16,
    "relative_attention_max_distance": 1 << 24,
}
#: What of a config.json a model without weights is made from.
SIZE_FIELDS = (
    *SIZES,
    "feed_forward_proj",
    "dropout_rate",
    "tie_word_embeddings",
    "pad_token_id",
    "decoder_start_token_id",
)


@dataclass(frozen=True, kw_only=True)
class T5(Named, EncoderDecoder):
    """A family of T5s whose feed-forward is gated, or is not."""

    is_gated: bool

    peft_feed_forward: ClassVar[tuple[str, ...]] = ("wo",)
    default_fields: ClassVar[Mapping[str, Any]] = {"decoder_start_token_id": 0}

    # -- configuration ---------------------------------------------------------------------------

    def matches(self, config: Any) -> bool:
        """By model type and by the kind of the feed-forward."""
        is_gated = bool(getattr(config, "is_gated_act", False))
        return config.model_type in self.model_types and is_gated == self.is_gated

    def make_config(self, fields: Mapping[str, Any]) -> Any:
        """transformers' configuration of a recipe's fields, and of their type if they say one.

        Raises `BackboneError` if no T5 has them.
        """
        kind = config_class(fields.get("model_type", self.model_types[0]))
        given = {name: value for name, value in fields.items() if name != "model_type"}
        known = {field.name for field in dataclasses.fields(kind)}
        known |= {"tie_word_embeddings", "decoder_start_token_id"}
        for name in sorted(set(given) - known):
            hint = did_you_mean(name, known)
            raise BackboneError(f"backbone.config: T5 has no setting '{name}'{hint}")
        try:
            return kind(**given)
        except Exception as error:
            raise BackboneError(f"backbone.config: {first_line(error)}") from error

    def check_config(self, config: Any, place: str) -> None:
        """Raise `BackboneError` for sizes and activations that no T5 can have."""
        from transformers.activations import ACT2FN

        for name, largest in SIZES.items():
            size = getattr(config, name)
            if not isinstance(size, int) or not 1 <= size <= largest:
                is_small = isinstance(size, int) and size < 1
                bound = "at least 1" if is_small else f"a whole number in 1..{largest}"
                raise BackboneError(f"{place}: {name} {size} is not {bound}")
        _check_attention(config, place)
        _check_tokens(config, place)
        if not config.is_encoder_decoder:
            raise BackboneError(
                f"{place}: is_encoder_decoder is false, and an encoder alone is no backbone; use "
                "the whole T5"
            )
        if not 0.0 <= config.dropout_rate < 1.0:
            raise BackboneError(f"{place}: dropout_rate {config.dropout_rate} is not in [0, 1)")
        if config.dense_act_fn not in ACT2FN:
            known = did_you_mean(config.dense_act_fn, ACT2FN)
            raise BackboneError(
                f"{place}: feed_forward_proj: no activation '{config.dense_act_fn}'{known}"
            )

    def required_fields(self, config: Any) -> dict[str, Any]:
        """The tokens for padding and for the end, and the decoder's start, by default padding."""
        pad, end = config.pad_token_id, config.eos_token_id
        pad = PAD if pad is None else pad
        start = getattr(config, "decoder_start_token_id", None)
        return {
            "pad_token_id": pad,
            "eos_token_id": END if end is None else end,
            "decoder_start_token_id": pad if start is None else start,
        }

    def size_fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are set, of those that a model's shapes follow from."""
        return {name: raw[name] for name in SIZE_FIELDS if raw.get(name) is not None}

    def width_of(self, raw: Mapping[str, Any]) -> int | None:
        """The width of encoder and decoder."""
        width = raw.get("d_model")
        return width if type(width) is int else None

    def is_of(self, raw: Mapping[str, Any]) -> bool:
        """By the kind of the feed-forward."""
        return str(raw.get("feed_forward_proj", "relu")).startswith("gated-") == self.is_gated

    def linears_of(
        self, raw: Mapping[str, Any]
    ) -> tuple[Mapping[str, Blocks], Mapping[str, tuple[int, int]]] | None:
        """As many decoder blocks as encoder blocks, where it does not say."""
        depth = raw.get("num_layers")
        given = {**raw, "num_decoder_layers": raw.get("num_decoder_layers") or depth}
        names = ("d_model", "d_kv", "num_heads", "d_ff", "num_layers", "num_decoder_layers")
        sizes = [given.get(name) for name in names]
        known = [
            size
            for name, size in zip(names, sizes, strict=True)
            if type(size) is int and 1 <= size <= SIZES[name]
        ]
        if len(known) < len(names):
            return None
        width, d_kv, n_heads, d_ff, *counts = known
        blocks = {
            stack: pattern.at(n)
            for (stack, pattern), n in zip(self.patterns.items(), counts, strict=True)
        }
        inner = n_heads * d_kv
        widths = dict.fromkeys("qkv", (width, inner)) | {"o": (inner, width), "wo": (d_ff, width)}
        linears = [name for stack in blocks.values() for name in stack.list_linears()]
        return blocks, {name: widths.get(last_part(name), (width, d_ff)) for name in linears}

    def writer_of(
        self, linear: str, raw: Mapping[str, Any] | None, *, has_negative: bool
    ) -> str | None:
        """Values before attention, which sums over tokens, and what is read of the feed-forward.

        Where that is not gated, an activation lies between: ReLU lets factors from 0 through.
        """
        parent, _, kind = linear.rpartition(".")
        writer = self.inputs.get(kind)
        if writer is None:
            return None
        is_relu = raw is not None and raw.get("feed_forward_proj", "relu") == "relu"
        if kind == "wo" and not self.is_gated and (has_negative or not is_relu):
            return None
        return f"{parent}.{writer}"

    # -- the module ------------------------------------------------------------------------------

    def model_class(self, config: Any) -> Any:
        """transformers' class for the type of the configuration."""
        from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

        return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]

    def arrange(self, raw: Mapping[str, Any], names: frozenset[str]) -> Arrangement:
        """The embedding, where a copy (MADLAD) or the head that is said to be tied stands alone.

        Old checkpoints have a position bias in cross-attention, which none is computed from.
        """
        copies = (*EMBEDDING_ALIASES, *((HEAD,) if _says_tied(raw) else ()))
        stored = next((name for name in (EMBEDDING, *copies) if name in names), EMBEDDING)
        renamed = {} if stored == EMBEDDING else {EMBEDDING: Stored((stored,))}
        end = ".relative_attention_bias.weight"
        unused = {name for name in names if "EncDecAttention" in name and name.endswith(end)}
        return Arrangement(renamed, frozenset(unused))

    def find_ties(
        self, raw: Mapping[str, Any], names: frozenset[str], are_equal: Callable[[str, str], bool]
    ) -> dict[str, str]:
        """The embedding's copies; the head too where it is absent, or said and found to be equal.

        transformers ties an untied head to the embedding without a word when it loads under ZeRO-3
        (T0, T5 v1.1, FLAN), and saves `tie_word_embeddings: true` whatever the model has.
        """
        both = EMBEDDING in names and HEAD in names
        is_tied = HEAD not in names or (_says_tied(raw) and both and are_equal(HEAD, EMBEDDING))
        return dict.fromkeys((*EMBEDDING_ALIASES, *((HEAD,) if is_tied else ())), EMBEDDING)

    def tie(self, model: Any, ties: Mapping[str, str]) -> None:
        """Make the tied parameters one, and let the configuration say so.

        That of umT5 says of itself whether states are scaled before the head, whatever is tied.
        """
        super().tie(model, ties)
        if model.config.model_type != "umt5":
            model.config.tie_word_embeddings = HEAD in ties

    def random_weight(
        self, config: Any, name: str, shape: tuple[int, ...], generator: torch.Generator
    ) -> Tensor:
        """A weight by T5's own rules."""
        c, factor = config, config.initializer_factor
        tensor = torch.empty(shape)
        if "layer_norm" in name:
            return tensor.fill_(factor)
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        std = {
            "shared": 1.0,
            "lm_head": 1.0,
            "q": (c.d_model * c.d_kv) ** -0.5,
            "o": (c.num_heads * c.d_kv) ** -0.5,
            "wo": c.d_ff**-0.5,
        }.get(last, c.d_model**-0.5)
        return tensor.normal_(0.0, factor * std, generator=generator)

    def fuse(self, model: nn.Module, settings: Settings) -> None:
        """Faster attention, feed-forward and norms (`t5_fused`)."""
        from mhr_scale.families import t5_fused

        t5_fused.install(model, settings)

    def cannot_lay(self, model: Any) -> str | None:
        """Where the fused attention is not in place."""
        if model.config.model_type == "umt5":
            return "attention of umT5 takes padded rows only"
        from mhr_scale.families.t5_fused import Attention

        if not any(isinstance(module, Attention) for module in model.modules()):
            return "it needs backbone.fused_attention: true"
        return None

    def embeddings(self, model: Any) -> list[nn.Module]:
        """Encoder and decoder have modules of their own for one tensor."""
        return [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens]

    def input_mask(self, model: Any, packed: Packed) -> Tensor:
        """The mask that attention adds: of tokens transformers would read whether one is needed.

        On a GPU the host would wait for that.
        """
        return self.added_mask(model, packed.inputs["attention_mask"])

    def start_id(self, config: Any) -> int:
        """The decoder's start token."""
        start: int = config.decoder_start_token_id
        return start


def make_byte_tokenizer() -> Any:
    """ByT5's tokenizer: a token for each byte of UTF-8."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def _check_tokens(config: Any, place: str) -> None:
    """Raise `BackboneError` for special tokens that are no token, or several."""
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, list):
            raise BackboneError(
                f"{place}: {name} {token} is a list, and a T5 has one; give the tokenizer's alone"
            )
        is_token = isinstance(token, int) and 0 <= token < config.vocab_size
        if token is not None and not is_token:
            raise BackboneError(f"{place}: {name} {token} is not in 0..{config.vocab_size - 1}")


def _says_tied(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says, or leaves it to T5, that the head is the embedding."""
    return raw.get("tie_word_embeddings") is not False


def _check_attention(config: Any, place: str) -> None:
    """Raise `BackboneError` for buckets of distances that T5's logarithm is not defined for."""
    buckets = config.relative_attention_num_buckets
    distance = config.relative_attention_max_distance
    if buckets < 4 or distance <= buckets // 2:
        raise BackboneError(
            f"{place}: relative_attention_num_buckets {buckets} is below 4, or no less than twice "
            f"relative_attention_max_distance {distance}"
        )
    for name in ("layer_norm_epsilon", "initializer_factor"):
        value = getattr(config, name)
        if not (isinstance(value, int | float) and 0.0 <= value < float("inf")):
            raise BackboneError(f"{place}: {name} {value} is not a number from 0")


def _make_family(*, name: str, model_types: tuple[str, ...], wide: Sequence[str]) -> T5:
    """T5s whose feed-forward has the linears `wide`, then wo."""
    attention, feed_forward = ("q", "k", "v", "o"), (*wide, "wo")
    return T5(
        name=name,
        model_types=model_types,
        is_gated=len(wide) > 1,
        patterns={
            "encoder": BlockPattern(
                name="encoder.block",
                depth="num_layers",
                sublayers=(
                    below("layer.0.SelfAttention", attention),
                    below("layer.1.DenseReluDense", feed_forward),
                ),
            ),
            "decoder": BlockPattern(
                name="decoder.block",
                depth="num_decoder_layers",
                sublayers=(
                    below("layer.0.SelfAttention", attention),
                    below("layer.1.EncDecAttention", attention),
                    below("layer.2.DenseReluDense", feed_forward),
                ),
            ),
        },
        layouts={
            "full": (*attention, *feed_forward),
            "light": ("k", "v", wide[-1]),
            "attention": attention,
        },
        inputs={"o": "v", "wo": wide[-1]},
        abbreviations=ABBREVIATIONS,
    )


#: Parts of names, and what pictures say for them.
ABBREVIATIONS = (
    (r"\bencoder\.block\.", "enc."),
    (r"\bdecoder\.block\.", "dec."),
    (r"\.layer\.\d+\.", "."),
    ("SelfAttention", "self"),
    ("EncDecAttention", "cross"),
    ("DenseReluDense", "ff"),
)

GATED = _make_family(
    name="T5 v1.1 (gated: LM-adapt, T0, FLAN, mT5, umT5)",
    model_types=("t5", "mt5", "umt5"),
    wide=("wi_0", "wi_1"),
)
UNGATED = _make_family(name="T5 v1.0 (ungated)", model_types=("t5",), wide=("wi",))
