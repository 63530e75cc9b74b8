"""The form of encoder-decoder backbones: inputs to the encoder, answers to the decoder.

All answers of a row stand side by side in one decoder row, under a mask that is causal inside an
answer and shut between answers. Where positions count by the distance of two tokens only, as T5's
do, every answer sees what it would see alone, while the encoder and the keys and values of
cross-attention run once per row.

Shape letters: B rows, L input tokens, D target positions, V vocabulary, H width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mhr_scale.families.causal_masks import additive
from mhr_scale.families.family import Family, Side
from mhr_scale.families.flat import Flat
from mhr_scale.families.packed import (
    PAD_MULTIPLE,
    EncodedRow,
    Packed,
    Targets,
    lay_answers,
    pad_ids,
)
from mhr_scale.families.sending import send
from mhr_scale.families.sequences import SpreadStream, group_alike, take


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Family):
    """A family of encoder-decoders."""

    peft_task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    # -- rows ------------------------------------------------------------------------------------

    def close(self, ids: list[int], side: Side, tokenizer: Any) -> list[int]:
        """Ids with the end-of-sequence token, on either side."""
        return [*ids, tokenizer.eos_token_id]

    @abstractmethod
    def start_id(self, config: Any) -> int:
        """The token that every answer begins behind."""

    def pack(
        self,
        rows: Sequence[EncodedRow],
        config: Any,
        *,
        pad_multiple: int = PAD_MULTIPLE,
        at_least: tuple[int, int] = (0, 0),
        is_flat: bool = False,
        token_multiple: int = 1,
    ) -> Packed:
        """Inputs for the encoder, answers side by side for the decoder."""
        import numpy as np

        width, depth = at_least
        pad_id: int = config.pad_token_id
        ids, mask = pad_ids(
            [row.input_ids for row in rows], pad_id=pad_id, multiple=pad_multiple, at_least=width
        )
        read, labels, choices, starts = lay_answers(
            rows, start_id=self.start_id(config), pad_id=pad_id, at_least=depth
        )
        n_positions, sources, flat = ids.size + labels.size, None, None
        if is_flat:
            targets = choices >= 0
            groups = group_alike(mask.sum(1)) if at_least == (0, 0) else ()
            of_input = SpreadStream.of(mask > 0, multiple=token_multiple, groups=groups)
            of_target = SpreadStream.of(
                targets,
                multiple=token_multiple,
                other_than=of_input.n_tokens,
                groups=groups,
            )
            ids = take(ids, mask > 0, of_input.n_tokens)
            read = take(read, targets, of_target.n_tokens)
            sources = Targets(torch.from_numpy(np.flatnonzero(targets)), None)
            n_positions = of_input.n_tokens + of_target.n_tokens
            flat = Flat((of_input, of_target))
        arrays = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": read}
        return Packed(
            rows=tuple(rows),
            inputs={name: torch.from_numpy(array) for name, array in arrays.items()},
            labels_BD=torch.from_numpy(labels),
            choices_BD=torch.from_numpy(choices),
            starts=starts,
            n_positions=n_positions,
            n_padding=n_positions - sum(len(r.input_ids) + r.n_answer_tokens for r in rows),
            sources=sources,
            flat=flat,
        )

    # -- passes ----------------------------------------------------------------------------------

    def predictions(self, model: Any, packed: Packed) -> Tensor:
        """Logits of the decoder; of several answers a row each sees itself alone."""
        inputs = {**packed.inputs, "attention_mask": self.input_mask(model, packed)}
        output = model(**inputs, **self.decoder_inputs(model, packed), use_cache=False)
        logits: Tensor = output.logits
        if isinstance(packed.sources, Targets):
            logits = logits[0, : len(packed.sources.places_N)]
        return logits

    def input_mask(self, model: Any, packed: Packed) -> Tensor:
        """The tokens of the inputs (B, L); of rows laid flat the mask that attention adds."""
        is_token_BL = packed.inputs["attention_mask"]
        return is_token_BL if packed.flat is None else self.added_mask(model, is_token_BL)

    def added_mask(self, model: Any, is_token_BL: Tensor) -> Tensor:
        """The mask (B, 1, 1, L) that attention adds where a row has no token."""
        return additive(is_token_BL[:, None] > 0, self._dtype(model))

    def decoder_inputs(self, model: Any, packed: Packed) -> dict[str, Any]:
        """What lets each answer see itself alone: a mask, where there are several in a row.

        A mask is enough where positions count by the distance of two tokens.
        """
        mask = None
        if packed.n_choices > 1 or packed.flat is not None:
            mask = shut_between(packed.choices_BD, self._dtype(model))
        return {"decoder_attention_mask": mask}

    def _dtype(self, model: Any) -> torch.dtype:
        dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        return dtype

    def generate(
        self, model: Any, rows: Sequence[EncodedRow], *, device: torch.device, **options: Any
    ) -> list[list[int]]:
        """What the decoder writes; its start token is a special one, which no text shows."""
        inputs = self._encoder_inputs(rows, model.config, device)
        ids: list[list[int]] = model.generate(
            **inputs, past_key_values=_new_cache(), **options
        ).tolist()
        return ids

    def states(self, model: Any, packed: Packed) -> tuple[Tensor, Tensor]:
        """The encoder's states of the inputs (B, L, H), and their mask (B, L)."""
        inputs = {name: packed.inputs[name] for name in ("input_ids", "attention_mask")}
        return model.get_encoder()(**inputs).last_hidden_state, inputs["attention_mask"]

    def run_generation(self, model: Any, packed: Packed, *, beams: int, new_tokens: int) -> None:
        """The encoder, then the decoder token by token over its cache."""
        ids, mask = packed.inputs["input_ids"], packed.inputs["attention_mask"]
        states = model.get_encoder()(input_ids=ids, attention_mask=mask)
        states["last_hidden_state"] = states.last_hidden_state.repeat_interleave(beams, 0)
        mask, cache = mask.repeat_interleave(beams, 0), _new_cache()
        for _ in range(new_tokens):
            output = model(
                encoder_outputs=states,
                attention_mask=mask,
                decoder_input_ids=ids.new_ones(len(ids) * beams, 1),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values

    def _encoder_inputs(
        self, rows: Sequence[EncodedRow], config: Any, device: torch.device
    ) -> dict[str, Tensor]:
        ids, mask = pad_ids([row.input_ids for row in rows], pad_id=config.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return {name: send(torch.from_numpy(array), device) for name, array in inputs.items()}


def _new_cache() -> Any:
    """A cache that grows with the decoder; transformers' own has as many layers as the encoder."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def encoder_of(model: Any) -> Any:
    """What of a model reads texts: its encoder, or all of it where it has no other part."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def shut_between(choices_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, D, D): 0 where a token may look, the smallest number elsewhere.

    A token may look at those of its own answer before it.
    """
    return additive((choices_BD[:, :, None] == choices_BD[:, None, :]).tril(), dtype)
