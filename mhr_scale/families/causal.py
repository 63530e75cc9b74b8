"""The form of decoder-only backbones: a prompt, and its answers as branches behind it.

A row is one sequence: padding, the prompt, then all its answers side by side. An answer sees the
prompt and itself; its positions go on from the prompt's end, so that it sees what it would see
alone, while the prompt runs once. Prompts end in the same column, which makes the positions that
predict one slice: from the last token of the prompt on. Masks are always our own, since several
families take rows for one text where they are told by positions alone.

Shape letters: B rows, L positions of a row, D target positions, V vocabulary, H width.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mhr_scale.errors import BackboneError, DataError
from mhr_scale.families import composed
from mhr_scale.families.causal_masks import has_window, masks_of
from mhr_scale.families.discovered import Discovered, find
from mhr_scale.families.family import Settings, Side
from mhr_scale.families.flat import Flat
from mhr_scale.families.packed import IGNORE, PAD_MULTIPLE, EncodedRow, Packed, Targets, read_at
from mhr_scale.families.sequences import SpreadStream, group_alike, take

#: Model types that are named where another one is refused.
KNOWN_TYPES = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"),
    *("olmo3", "granite", "phi", "phi3", "smollm3", "gpt_neox", "opt", "falcon", "gpt2"),
    *("qwen3_moe", "mixtral"),
)
#: Kinds of layers whose masks are made here; all others keep a state of the whole text.
LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})

#: What of a packed row's inputs is for masks and logits, and no argument of the model.
OUR_OWN = frozenset({"branches", "columns", "reads"})


@dataclass(frozen=True, kw_only=True)
class Causal(Discovered):
    """All causal language models of transformers whose blocks are attention and feed-forwards."""

    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    has_servers: ClassVar[bool] = True
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    special_tokens: ClassVar[tuple[str, ...]] = ("eos_token",)
    cut_side: ClassVar[Literal["left", "right"]] = "left"
    shares_prompts: ClassVar[bool] = True

    # -- configuration ---------------------------------------------------------------------------

    def knows(self, model_type: str) -> bool:
        """Whether transformers has a causal language model of this type, or one that sees too."""
        return _is_causal(model_type) or composed.knows(model_type)

    def matches(self, config: Any) -> bool:
        """By model type; a type may name an encoder-decoder too, whose decoder alone is known."""
        is_decoder = not getattr(config, "is_encoder_decoder", False)
        return _is_causal(config.model_type) and is_decoder

    def list_types(self) -> Sequence[str]:
        """Those that are tested."""
        return KNOWN_TYPES

    def check_config(self, config: Any, place: str) -> None:
        """Raise `BackboneError` for sizes that no model has, and for what is not exact here."""
        kind = config.model_type
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if not hasattr(config, name):
                raise BackboneError(
                    f"{place}: a {kind} has no {name}; use a backbone whose blocks are of "
                    "attention and feed-forwards, such as llama"
                )
            size = getattr(config, name)
            if type(size) is not int or size < 1:
                raise BackboneError(f"{place}: {name} {size} is not a whole number from 1")
        if getattr(config, "is_encoder_decoder", False):
            raise BackboneError(f"{place}: a {kind} is an encoder-decoder of no family known here")
        kinds = {
            *(getattr(config, "layer_types", None) or ()),
            *(kind for kind in getattr(config, "attention_layers", ()) if kind != "global"),
        }
        if getattr(config, "alibi", False) or kind in ("bloom", "mpt"):
            raise BackboneError(
                f"{place}: {kind} tells positions by ALiBi, which counts the tokens "
                "between two and not their positions: answers side by side would be wrong; use a "
                "backbone with rotary or learned positions"
            )
        if kinds - LAYER_KINDS:
            raise BackboneError(
                f"{place}: {kind} has layers of kind "
                f"{', '.join(sorted(kinds - LAYER_KINDS))}; only {', '.join(sorted(LAYER_KINDS))} "
                "see a row's answers apart"
            )
        if "sliding_attention" in kinds or (not kinds and has_window(config)):
            window = getattr(config, "sliding_window", None)
            if type(window) is not int or window < 1:
                raise BackboneError(
                    f"{place}: sliding_window {window} is not a whole number from 1, and layers of "
                    f"this {kind} look back so many tokens"
                )
        _check_experts(config, place)
        _check_ends(config, config.eos_token_id, place)
        self.check_module(config, place)
        takes = inspect.signature(self.model_class(config).forward).parameters
        for name in ("position_ids", "attention_mask", "logits_to_keep"):
            if name not in takes:  # it may be swallowed without a word
                raise BackboneError(
                    f"{place}: a {kind} takes no {name}, which tells a row's answers apart; use "
                    "another backbone, such as llama"
                )

    def set_ends(self, config: Any, generation: Mapping[str, Any], place: str) -> None:
        """One id where all say the same, else a list: the configuration's own first."""
        _check_ends(config, generation.get("eos_token_id"), place)
        ends = [*as_list(config.eos_token_id), *as_list(generation.get("eos_token_id"))]
        found = [end for end in dict.fromkeys(ends) if type(end) is int]
        config.eos_token_id = found if len(found) > 1 else next(iter(found), None)

    def most_positions(self, config: Any) -> tuple[int | None, bool]:
        """What the configuration says; learned positions have no more than that."""
        return getattr(config, "max_position_embeddings", None), find(self, config).learns_positions

    # -- the module ------------------------------------------------------------------------------

    def model_class(self, config: Any) -> Any:
        """transformers' class for the type of the configuration."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def fuse(self, model: Any, settings: Settings) -> None:
        """Faster attention, feed-forwards and norms (`causal_fused`)."""
        from mhr_scale.families import causal_fused

        causal_fused.install(model, self.blocks(model.config), self.norms(model), settings)

    def cannot_lay(self, model: Any) -> str | None:
        """Where attention is not ours."""
        from mhr_scale.families.causal_fused import OURS

        if model.config._attn_implementation in OURS.values():
            return None
        if not model._supports_attention_backend:
            return f"attention of a {model.config.model_type} takes padded rows only"
        return "it needs backbone.fused_attention: true"

    # -- rows ------------------------------------------------------------------------------------

    def close(self, ids: list[int], side: Side, tokenizer: Any) -> list[int]:
        """A prompt behind its beginning, a target before its end (`close_text`)."""
        return close_text(ids, side, tokenizer)

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
        """Padding, prompt and answers of each row; prompts end in the same column.

        The last token of an answer is predicted only, never read.
        """
        import numpy as np

        width = max(at_least[0], *(len(row.input_ids) for row in rows))
        depth = max(at_least[1], *(row.n_answer_tokens for row in rows))
        tail = max(depth - 1, 0)
        length = -(-(width + tail) // pad_multiple) * pad_multiple
        width = length - tail
        self._check_length(rows, length, config)
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
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        inputs["reads"] = torch.arange(width - 1, length)
        has_branches = any(len(row.answers) > 1 for row in rows)
        found: Tensor | Targets | None = torch.from_numpy(sources) if has_branches else None
        n_tokens, n_positions, flat = int((branches >= 0).sum()), ids.size, None
        if is_flat:
            is_token = branches >= 0
            groups = group_alike(is_token.sum(1)) if at_least == (0, 0) else ()
            stream = SpreadStream.of(is_token, multiple=token_multiple, groups=groups)
            n_positions = stream.n_tokens
            flat = Flat((stream,), is_causal=not has_branches)
            inputs["columns"] = inputs["position_ids"]
            for name in ("input_ids", "position_ids"):
                inputs[name] = torch.from_numpy(take(arrays[name], is_token, n_positions))
            token_of = is_token.cumsum().reshape(is_token.shape) - 1
            tokens = np.take_along_axis(token_of, sources + width - 1, 1)
            inputs["reads"], found = read_at(tokens, labels)
        return Packed(
            rows=tuple(rows),
            inputs=inputs,
            labels_BD=torch.from_numpy(labels),
            choices_BD=torch.from_numpy(choices),
            starts=tuple(starts),
            n_positions=n_positions,
            n_padding=n_positions - n_tokens,
            sources=found,
            flat=flat,
        )

    def pack_shared(self, rows: Sequence[EncodedRow], config: Any) -> Packed:
        """As branches of trees (`branched`)."""
        from mhr_scale.families import branched

        length = max(len(row.input_ids) + row.n_answer_tokens for row in rows)
        self._check_length(rows, length, config)
        return branched.pack(rows, pad_multiple=PAD_MULTIPLE)

    def _check_length(self, rows: Sequence[EncodedRow], length: int, config: Any) -> None:
        """Raise `DataError` for a row that learned positions have no end of."""
        if length <= getattr(config, "max_position_embeddings", length):
            return
        most, is_all = self.most_positions(config)
        assert most is not None
        for row in rows if is_all else ():
            n_tokens = len(row.input_ids) + max((len(a) - 1 for a in row.answers), default=0)
            if n_tokens > most:
                raise DataError(
                    f"row {row.number}: a prompt and its longest answer are {n_tokens} tokens; the "
                    f"backbone has learned {most} positions; lower the lengths they are cut to"
                )

    # -- passes ----------------------------------------------------------------------------------

    def predictions(self, model: Any, packed: Packed) -> Tensor:
        """Logits of what comes behind the prompt and behind each token of an answer."""
        output = model(
            **_tokens(packed),
            attention_mask=masks_of(model, packed),
            # not their number: for a slice of the states torch repeats a frozen head for each row
            logits_to_keep=packed.inputs["reads"],
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits if packed.flat is None else logits[0]

    def generate(
        self, model: Any, rows: Sequence[EncodedRow], *, device: torch.device, **options: Any
    ) -> list[list[int]]:
        """What the model writes behind each prompt, padded on its left, up to its end."""
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
        ends = as_list(model.config.eos_token_id)
        return [list(takewhile(lambda token: token not in ends, new)) for new in written]

    def states(self, model: Any, packed: Packed) -> tuple[Tensor, Tensor]:
        """The last hidden states of prompts (B, L, H), and their mask (B, L)."""
        output = model.base_model(
            **_tokens(packed), attention_mask=masks_of(model, packed), use_cache=False
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


def _is_causal(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _check_ends(config: Any, ends: Any, place: str) -> None:
    """Raise `BackboneError` for ends of sequence that are no token of the backbone."""
    for end in as_list(ends):
        if type(end) is not int or not 0 <= end < config.vocab_size:
            raise BackboneError(
                f"{place}: eos_token_id {end} is none of the {config.vocab_size} tokens that the "
                "backbone embeds; correct it"
            )


def _check_experts(config: Any, place: str) -> None:
    """Raise `BackboneError` for a mixture whose tokens go to more experts than there are."""
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = getattr(config, name, None)
        if type(chosen) is type(experts) is int and experts and not 1 <= chosen <= experts:
            raise BackboneError(
                f"{place}: num_experts_per_tok {chosen} is not in 1..{experts}, the number of "
                "experts; correct it"
            )


def _tokens(packed: Packed) -> dict[str, Tensor]:
    """What the model is called with, masks apart; others may have put more there than `pack`."""
    return {name: tensor for name, tensor in packed.inputs.items() if name not in OUR_OWN}


def close_text(ids: list[int], side: Side, tokenizer: Any) -> list[int]:
    """An input behind the beginning of sequence, if the tokenizer adds one; a target's end.

    An input without any token is one end of sequence: something has to predict the target.
    """
    if side == "target":
        return [*ids, tokenizer.eos_token_id]
    return [*begin_of(tokenizer), *ids] or [tokenizer.eos_token_id]


def begin_of(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts in front of a text: a beginning of sequence, or nothing.

    Told from what it puts behind: one token may be the beginning and the end of a sequence.
    """
    text: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    whole: list[int] = tokenizer("a").input_ids
    starts = range(len(whole) - len(text) + 1)
    start = next((n for n in starts if whole[n : n + len(text)] == text), 0)
    return whole[:start]


def as_list(ids: Any) -> list[Any]:
    """One id or several as a list."""
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def pad_of(config: Any) -> int:
    """The id that stands where no token is; masks and labels tell padding, never its id."""
    known = [*as_list(config.pad_token_id), *as_list(config.eos_token_id)]
    return next((token for token in known if 0 <= token < config.vocab_size), 0)


CAUSAL = Causal(
    name="causal language models",
    inputs={
        "o_proj": "q_proj",
        "out_proj": "q_proj",
        "down_proj": "up_proj",
        "fc2": "fc1",
        "fc_out": "fc_in",
        "dense_4h_to_h": "dense_h_to_4h",
        "c_proj": "c_fc",
    },
    abbreviations=(
        (r"\b(?:model|transformer|gpt_neox)\.(?:decoder\.)?(?:layers|h|blocks)\.", "dec."),
        (r"\bself_attn\.|\battn\.|\bself_attention\.|\battention\.", ""),
        (r"\bmlp\.", ""),
        (r"_proj\b", ""),
    ),
)
