"""Causal language models of a few thousand weights, one for each family."""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from mhr_scale.families.packed import EncodedRow

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2}
PLAIN = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
#: By name, the class of the configuration and its fields.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "ministral": ("Ministral3Config", {**GROUPED, "head_dim": 8}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "olmo2": ("Olmo2Config", GROUPED),
    "olmo3": ("Olmo3Config", {**GROUPED, "sliding_window": 8}),
    "granite": ("GraniteConfig", {**GROUPED, "residual_multiplier": 0.5}),
    "phi": ("PhiConfig", SIZES),
    "phi3": ("Phi3Config", GROUPED),
    "phi4": ("Phi3Config", {**GROUPED, "partial_rotary_factor": 0.5}),
    "smollm3": ("SmolLM3Config", {**GROUPED, "no_rope_layers": [1, 0]}),
    "neox": ("GPTNeoXConfig", SIZES),
    "opt": (
        "OPTConfig",
        {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "falcon": ("FalconConfig", {**PLAIN, "multi_query": True, "alibi": False}),
    "falcon new": (
        "FalconConfig",
        {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "gptj": (
        "GPTJConfig",
        {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
    "gpt2": ("GPT2Config", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {**GROUPED, **EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "mixtral": ("MixtralConfig", {**GROUPED, **EXPERTS, "num_local_experts": 4}),
}
#: Lengths of prompts and of their answers.
PROMPTS = ((11, (3, 1, 4)), (7, (2,)), (13, (1, 2)))


def small_causal(family: str, **changes: Any) -> Any:
    """A model whose weights are large enough that each of them tells."""
    kind, fields = FAMILIES[family]
    config = getattr(transformers, kind)(**{**fields, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return enlarge(transformers.AutoModelForCausalLM.from_config(config))


def enlarge(model: Any) -> Any:
    """The model with other weights, ready to answer."""
    for parameter in model.parameters():
        parameter.data = 0.15 * torch.randn_like(parameter) + (parameter.ndim == 1)
    return model.eval()


def make_rows() -> list[EncodedRow]:
    """Prompts with one answer or several."""
    draw = np.random.default_rng(0)
    return [
        EncodedRow(draw.integers(5, 90, n), tuple(draw.integers(5, 90, m) for m in answers))
        for n, answers in PROMPTS
    ]


@torch.no_grad()
def plain_logits(model: nn.Module) -> list[Tensor]:
    """The logits of each answer behind its prompt alone, as transformers computes them."""
    found = []
    for row in make_rows():
        for answer in row.answers:
            ids = torch.from_numpy(np.concatenate([row.input_ids, answer]))[None]
            logits = model(input_ids=ids, use_cache=False).logits
            found.append(logits[0, len(row.input_ids) - 1 : -1].float())
    return found


def packed_logits(model: Any, family: Any, *, gradient: bool = False) -> list[Tensor]:
    """The same of one pass over all rows, answers side by side."""
    packed = family.pack(make_rows(), model.config)
    with torch.set_grad_enabled(gradient):
        logits = family.logits(model, packed).float()
    return [
        logits[number, start : start + len(answer)]
        for number, row in enumerate(packed.rows)
        for start, answer in zip(packed.starts[number], row.answers, strict=True)
    ]


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of the largest logit."""
    pairs = list(zip(ours, theirs, strict=True))
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest
