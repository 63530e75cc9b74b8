"""T5Gemma: an encoder-decoder of Gemma 2's blocks, with cross-attention in the decoder's.

Positions are rotary, and half of the layers have a sliding window: answers side by side are told
apart by positions that begin anew for each and by a mask for each kind of layer.

Shape letters: B rows, D target positions.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mhr_scale.errors import BackboneError
from mhr_scale.families.causal import close_text, pad_of
from mhr_scale.families.causal_masks import make_masks
from mhr_scale.families.discovered import Discovered
from mhr_scale.families.encoder_decoder import EncoderDecoder
from mhr_scale.families.family import Side
from mhr_scale.families.packed import EncodedRow, Packed

#: Sizes of either stack that have to be at least 1.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads"),
)


@dataclass(frozen=True, kw_only=True)
class T5Gemma(Discovered, EncoderDecoder):
    """The one type of the family; encoder and decoder have a configuration each."""

    stacks: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    default_fields: ClassVar[Mapping[str, Any]] = {}

    # -- configuration ---------------------------------------------------------------------------

    def knows(self, model_type: str) -> bool:
        """Whether it is the type."""
        return model_type == "t5gemma"

    def list_types(self) -> Sequence[str]:
        """The type."""
        return ("t5gemma",)

    def check_config(self, config: Any, place: str) -> None:
        """Raise `BackboneError` for sizes that no model has, and for an encoder alone."""
        if not config.is_encoder_decoder:
            raise BackboneError(
                f"{place}: is_encoder_decoder is false, and an encoder alone is no backbone; use "
                "the whole T5Gemma"
            )
        for stack in self.stacks:
            for name in SIZES:
                size = getattr(getattr(config, stack), name)
                if type(size) is not int or size < 1:
                    raise BackboneError(
                        f"{place}: {stack}.{name} {size} is not a whole number from 1"
                    )
        sizes = [getattr(config, stack).vocab_size for stack in self.stacks]
        if len(set(sizes)) > 1:
            raise BackboneError(
                f"{place}: vocab_size is {sizes[0]} in the encoder and {sizes[1]} in the decoder; "
                "a tokenizer has one"
            )

    def required_fields(self, config: Any) -> dict[str, Any]:
        """The vocabulary of both stacks, and the tokens that are the decoder's."""
        decoder = config.decoder
        start = getattr(config, "decoder_start_token_id", None)
        return {
            "vocab_size": decoder.vocab_size,
            "pad_token_id": pad_of(decoder),
            "eos_token_id": decoder.eos_token_id,
            "decoder_start_token_id": decoder.bos_token_id if start is None else start,
        }

    def width_of(self, raw: Mapping[str, Any]) -> int | None:
        """The decoder's width; the encoder may have another one."""
        config = self._read(raw)
        return None if config is None else int(config.decoder.hidden_size)

    def resize(self, config: Any, depths: Mapping[str, int]) -> Any:
        """The configuration with so many blocks per stack."""
        resized = copy.deepcopy(config)
        for stack, count in depths.items():
            setattr(resized, stack, super().resize(getattr(config, stack), {stack: count}))
        return resized

    # -- the module ------------------------------------------------------------------------------

    def model_class(self, config: Any) -> Any:
        """transformers' class."""
        from transformers import T5GemmaForConditionalGeneration

        return T5GemmaForConditionalGeneration

    def embeddings(self, model: Any) -> list[nn.Module]:
        """Those of encoder and decoder."""
        return [model.model.encoder.embed_tokens, model.model.decoder.embed_tokens]

    # -- rows and passes -------------------------------------------------------------------------

    def close(self, ids: list[int], side: Side, tokenizer: Any) -> list[int]:
        """An input behind its beginning, a target before its end (`close_text`)."""
        return close_text(ids, side, tokenizer)

    def start_id(self, config: Any) -> int:
        """The decoder's beginning of sequence."""
        start: int = config.decoder_start_token_id
        return start

    def decoder_inputs(self, model: Any, packed: Packed) -> dict[str, Any]:
        """Masks by kind of layer, and positions from 0 for each answer."""
        choices_BD = packed.choices_BD
        positions_BD = _positions(choices_BD)
        masks = make_masks(
            model.config.decoder,
            torch.where(choices_BD < 0, choices_BD, choices_BD + 1),  # 0 is what all answers see
            positions_BD,
            model.get_input_embeddings().weight.dtype,
        )
        return {"decoder_attention_mask": masks, "decoder_position_ids": positions_BD}

    def generate(
        self, model: Any, rows: Sequence[EncodedRow], *, device: torch.device, **options: Any
    ) -> list[list[int]]:
        """What the decoder writes."""
        start = self.start_id(model.config)
        return super().generate(
            model, rows, device=device, **{"decoder_start_token_id": start, **options}
        )


def _positions(choices_BD: Tensor) -> Tensor:
    """Where in its answer each position is: (B, D)."""
    places_BD = torch.arange(choices_BD.shape[1], device=choices_BD.device).expand_as(choices_BD)
    is_first = torch.ones_like(choices_BD, dtype=torch.bool)
    is_first[:, 1:] = choices_BD[:, 1:] != choices_BD[:, :-1]
    starts_BD = torch.where(is_first, places_BD, 0).cummax(1).values
    return places_BD - starts_BD


T5GEMMA = T5Gemma(
    name="T5Gemma",
    inputs={"o_proj": "q_proj", "down_proj": "up_proj"},
    abbreviations=(
        (r"\bmodel\.encoder\.layers\.", "enc."),
        (r"\bmodel\.decoder\.layers\.", "dec."),
        (r"\bself_attn\.", "self."),
        (r"\bcross_attn\.", "cross."),
        (r"\bmlp\.", ""),
        (r"_proj\b", ""),
    ),
)
