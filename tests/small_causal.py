"""Small random decoder-only models, one of each family that is known to be exact."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WORDS = 128
#: Sizes that most families call by these names.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 8},
    "ministral3": {**GROUPED, "head_dim": 8},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**GROUPED, "head_dim": 16, "sliding_window": 8},
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 8},
    "granite": GROUPED,
    "phi": SIZES,
    "phi3": {**GROUPED, "pad_token_id": 0},
    "smollm3": {**GROUPED, "pad_token_id": 0},
    "gpt_neox": SIZES,
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
    },
    "falcon": {**FALCON, "multi_query": True, "new_decoder_architecture": False},
    "falcon, new": {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "qwen3_moe": {**GROUPED, **MIXTURE, "head_dim": 8},
    "mixtral": {**GROUPED, "num_local_experts": 4},
}


def make_causal(name: str, **changes: Any) -> Any:
    """A model of a family in evaluation mode, its weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    fields = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": 1, **FIELDS[name]}
    fields["tie_word_embeddings"] = False  # else a model repeats itself
    config = AutoConfig.for_model(name.partition(",")[0], **{**fields, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for place, parameter in model.named_parameters():
        near = 1.0 if parameter.ndim == 1 and place.endswith("weight") else 0.0
        parameter.data = torch.randn_like(parameter) * 0.15 + near
    return model
