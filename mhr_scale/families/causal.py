"""The form of decoder-only backbones: a prompt, and its answers as branches behind it.

A row is one sequence: padding, the prompt, then all its answers side by side. An answer sees the
prompt and itself; its positions go on from the prompt's end, so that it sees what it would see
alone, while the prompt runs once. Prompts end in the same column, which makes the positions that
predict one slice: from the last token of the prompt on. Masks are always our own, since several
families take rows for one text where they are told by positions alone.

Shape letters: B rows, L positions of a row, D target positions, V vocabulary, H width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mhr_scale.errors import BackboneError
from mhr_scale.families.causal_masks import make_masks
from mhr_scale.families.discovered import Discovered
from mhr_scale.families.family import Settings, Side
from mhr_scale.families.packed import IGNORE, PAD_MULTIPLE, EncodedRow, Packed

#: Model types that are named where another one is refused.
KNOWN_TYPES = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"),
    *("olmo3", "granite", "phi", "phi3", "smollm3", "gpt_neox", "opt", "falcon", "gpt2"),
    *("qwen3_moe", "mixtral"),
)
#: Kinds of layers whose masks are made here; all others keep a state of the whole text.
LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, kw_only=True)
class Causal(Discovered):
    """All causal language models of transformers whose blocks are attention and feed-forwards."""

    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    special_tokens: ClassVar[tuple[str, ...]] = ("eos_token",)
    cut_side: ClassVar[Literal["left", "right"]] = "left"

    # -- configuration ---------------------------------------------------------------------------

    def knows(self, model_type: str) -> bool:
        """Whether transformers has a causal language model of this type."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def list_types(self) -> Sequence[str]:
        """Those that are tested."""
        return KNOWN_TYPES

    def check_config(self, config: Any, place: str) -> None:
        """Raise `BackboneError` for sizes that no model has, and for what is not exact here."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            size = getattr(config, name, None)
            if type(size) is not int or size < 1:
                raise BackboneError(f"{place}: {name} {size} is not a whole number from 1")
        kinds = {
            *(getattr(config, "layer_types", None) or ()),
            *(kind for kind in getattr(config, "attention_layers", ()) if kind != "global"),
        }
        if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
            raise BackboneError(
                f"{place}: {config.model_type} tells positions by ALiBi, which counts the tokens "
                "between two and not their positions: answers side by side would be wrong; use a "
                "backbone with rotary or learned positions"
            )
        if kinds - LAYER_KINDS:
            raise BackboneError(
                f"{place}: {config.model_type} has layers of kind "
                f"{', '.join(sorted(kinds - LAYER_KINDS))}; only {', '.join(sorted(LAYER_KINDS))} "
                "see a row's answers apart"
            )

    # -- the module ------------------------------------------------------------------------------

    def model_class(self, config: Any) -> Any:
        """transformers' class for the type of the configuration."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def fuse(self, model: Any, settings: Settings) -> None:
        """Faster attention, feed-forwards and norms (`causal_fused`)."""
        from mhr_scale.families import causal_fused

        causal_fused.install(model, self.blocks(model.config), self.norms(model), settings)

    # -- rows ------------------------------------------------------------------------------------

    def close(self, ids: list[int], side: Side, tokenizer: Any) -> list[int]:
        """A prompt behind the beginning of sequence, if the tokenizer adds one; a target's end.

        A prompt without any token is one end of sequence: something has to predict the target.
        """
        if side == "target":
            return [*ids, tokenizer.eos_token_id]
        return [*begin_of(tokenizer), *ids] or [tokenizer.eos_token_id]

    def pack(
        self,
        rows: Sequence[EncodedRow],
        config: Any,
        *,
        pad_multiple: int = PAD_MULTIPLE,
        at_least: tuple[int, int] = (0, 0),
    ) -> Packed:
        """Padding, prompt and answers of each row; prompts end in the same column.

        The last token of an answer is predicted only, never read.
        """
        import numpy as np

        width = max(at_least[0], *(len(row.input_ids) for row in rows))
        depth = max(at_least[1], *(row.n_answer_tokens for row in rows))
        tail = max(depth - 1, 0)
        length = -(-(width + tail) // pad_multiple) * pad_multiple
        width = length - tail
        ids = np.full((len(rows), length), pad_of(config), dtype=np.int64)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        branches = np.full((len(rows), length), -1, dtype=np.int64)
        labels = np.full((len(rows), depth), IGNORE, dtype=np.int64)
        choices = np.full((len(rows), depth), -1, dtype=np.int64)
        sources = np.zeros((len(rows), depth), dtype=np.int64)
        starts = []
        for number, row in enumerate(rows):
            n_prompt = len(row.input_ids)
            prompt = slice(width - n_prompt, width)
            ids[number, prompt] = row.input_ids
            positions[number, prompt] = np.arange(n_prompt)
            branches[number, prompt] = 0
            begins, at, place = [], 0, width
            for choice, answer in enumerate(row.answers):
                n_read, end = len(answer) - 1, at + len(answer)
                read = slice(place, place + n_read)
                ids[number, read] = answer[:-1]
                positions[number, read] = np.arange(n_prompt, n_prompt + n_read)
                branches[number, read] = choice + 1
                labels[number, at:end] = answer
                choices[number, at:end] = choice
                sources[number, at + 1 : end] = np.arange(read.start, read.stop) - (width - 1)
                begins.append(at)
                at, place = end, read.stop
            starts.append(tuple(begins))
        arrays = {"input_ids": ids, "position_ids": positions, "branches": branches}
        if any(len(row.answers) > 1 for row in rows):
            arrays["sources"] = sources
        return Packed(
            rows=tuple(rows),
            inputs={name: torch.from_numpy(array) for name, array in arrays.items()},
            labels_BD=torch.from_numpy(labels),
            choices_BD=torch.from_numpy(choices),
            starts=tuple(starts),
            n_positions=ids.size,
        )

    # -- passes ----------------------------------------------------------------------------------

    def logits(self, model: Any, packed: Packed) -> Tensor:
        """Logits (B, D, V) of what comes behind the prompt and behind each token of an answer."""
        tokens = _tokens(packed)
        length, depth = tokens["input_ids"].shape[1], packed.labels_BD.shape[1]
        output = model(
            **tokens,
            attention_mask=_masks(model, packed),
            # not their number: for a slice of the states torch repeats a frozen head for each row
            logits_to_keep=torch.arange(length - depth, length, device=packed.labels_BD.device),
            use_cache=False,
        )
        logits_BDV: Tensor = output.logits
        sources = packed.inputs.get("sources")
        if sources is not None:  # several answers begin behind the same token
            logits_BDV = logits_BDV.gather(
                1, sources[..., None].expand(-1, -1, logits_BDV.shape[-1])
            )
        return logits_BDV

    def generate(
        self, model: Any, rows: Sequence[EncodedRow], *, device: torch.device, **options: Any
    ) -> list[list[int]]:
        """What the model writes behind each prompt, padded on its left."""
        prompts = [EncodedRow(row.input_ids) for row in rows]
        packed = self.pack(prompts, model.config, pad_multiple=1).to(device)
        mask = (packed.inputs["branches"] >= 0).long()
        ids: Tensor = model.generate(
            **_tokens(packed),
            attention_mask=mask,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=pad_of(model.config),
            **options,
        )
        written: list[list[int]] = ids[:, mask.shape[1] :].tolist()
        return written

    def states(self, model: Any, packed: Packed) -> tuple[Tensor, Tensor]:
        """The last hidden states of prompts (B, L, H), and their mask (B, L)."""
        output = model.base_model(
            **_tokens(packed), attention_mask=_masks(model, packed), use_cache=False
        )
        return output.last_hidden_state, (packed.inputs["branches"] == 0).long()

    def run_generation(self, model: Any, packed: Packed, *, beams: int, new_tokens: int) -> None:
        """The prompt, then token by token over its cache."""
        from transformers import DynamicCache

        cache = DynamicCache()
        inputs = {n: tensor.repeat_interleave(beams, 0) for n, tensor in _tokens(packed).items()}
        length = inputs["input_ids"].shape[1]
        for step in range(new_tokens):
            output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            new = inputs["input_ids"].new_full((len(inputs["input_ids"]), 1), 1)
            inputs = {"input_ids": new, "position_ids": new * (length + step)}


def _tokens(packed: Packed) -> dict[str, Tensor]:
    return {name: packed.inputs[name] for name in ("input_ids", "position_ids")}


def _masks(model: Any, packed: Packed) -> Any:
    return make_masks(
        model.config,
        packed.inputs["branches"],
        packed.inputs["position_ids"],
        model.get_input_embeddings().weight.dtype,
    )


def begin_of(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts in front of a text: a beginning of sequence, or nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("").input_ids[:1] == [begin] else []


def pad_of(config: Any) -> int:
    """The id that stands where no token is; masks and labels tell padding, never its id."""
    end = config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    known = (token for token in (config.pad_token_id, *ends) if token is not None)
    return next((token for token in known if 0 <= token < config.vocab_size), 0)


CAUSAL = Causal(
    name="causal language models",
    inputs={"o_proj": "v_proj", "down_proj": "up_proj"},
    abbreviations=(
        (r"\b(?:model|transformer|gpt_neox)\.(?:decoder\.)?(?:layers|h|blocks)\.", "dec."),
        (r"\bself_attn\.|\battn\.|\bself_attention\.|\battention\.", ""),
        (r"\bmlp\.", ""),
        (r"_proj\b", ""),
    ),
)
