"""Sizes of backbones by hub id: what `plan` reads instead of a config.json, which needs the hub.

Every row is checked against the number of weights that its authors publish.
"""

from typing import Any


def _t5(d_model: int, d_ff: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "vocab_size": 32128,
        "d_kv": 64,
        "d_model": d_model,
        "d_ff": d_ff,
        "num_heads": heads,
        "num_layers": layers,
    }


def _decoder(
    model_type: str,
    vocab_size: int,
    width: int,
    feed_forward: int,
    layers: int,
    heads: tuple[int, int],
    **more: Any,
) -> dict[str, Any]:
    """`heads` are those of queries and of keys."""
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "tie_word_embeddings": False,
        **more,
    }


def _llama3(width: int, feed_forward: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    more = {"max_position_embeddings": 131072, **more}
    return _decoder("llama", 128256, width, feed_forward, layers, (heads, 8), **more)


def _qwen3(width: int, feed_forward: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    more = {"head_dim": 128, "max_position_embeddings": 40960, **more}
    return _decoder("qwen3", 151936, width, feed_forward, layers, (heads, 8), **more)


def _gemma3(
    width: int, feed_forward: int, layers: int, heads: tuple[int, int], **more: Any
) -> dict[str, Any]:
    """The text model of a checkpoint that sees pictures too."""
    more = {
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        **more,
    }
    vocab_size = more.pop("vocab_size", 262208)
    return _decoder("gemma3_text", vocab_size, width, feed_forward, layers, heads, **more)


def _smollm2(width: int, feed_forward: int, layers: int, heads: tuple[int, int]) -> dict[str, Any]:
    more = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
    return _decoder("llama", 49152, width, feed_forward, layers, heads, **more)


#: T5 v1.1 by size: what LM-adapt, T0 and FLAN are too.
_V1_1 = {
    "small": _t5(512, 1024, 6, 8),
    "base": _t5(768, 2048, 12, 12),
    "large": _t5(1024, 2816, 16, 24),
    "xl": _t5(2048, 5120, 32, 24),
    "xxl": _t5(4096, 10240, 64, 24),
}
_LLAMA3 = {
    "3.1-8B": _llama3(4096, 14336, 32, 32),
    "3.1-70B": _llama3(8192, 28672, 80, 64),
    "3.2-1B": _llama3(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
    "3.2-3B": _llama3(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True),
}
_QWEN3 = {
    "0.6B": _qwen3(1024, 3072, 28, 16, tie_word_embeddings=True),
    "1.7B": _qwen3(2048, 6144, 28, 16, tie_word_embeddings=True),
    "4B": _qwen3(2560, 9728, 36, 32, tie_word_embeddings=True),
    "8B": _qwen3(4096, 12288, 36, 32),
    "14B": _qwen3(5120, 17408, 40, 40),
}
_GEMMA3 = {
    "1b": _gemma3(1152, 6912, 26, (4, 1), vocab_size=262144, sliding_window=512),
    "4b": _gemma3(2560, 10240, 34, (8, 4)),
    "12b": _gemma3(3840, 15360, 48, (16, 8)),
    "27b": _gemma3(5376, 21504, 62, (32, 16), head_dim=128),
}
_SMOLLM2 = {
    "135M": _smollm2(576, 1536, 30, (9, 3)),
    "360M": _smollm2(960, 2560, 32, (15, 5)),
    "1.7B": _smollm2(2048, 8192, 24, (32, 32)),
}
#: Fields of the configuration by hub id; those without a `model_type` are T5's.
KNOWN: dict[str, dict[str, Any]] = {
    **{f"google/t5-v1_1-{size}": fields for size, fields in _V1_1.items()},
    **{f"google/t5-{size}-lm-adapt": fields for size, fields in _V1_1.items()},
    **{f"google/flan-t5-{size}": fields for size, fields in _V1_1.items()},
    **{f"bigscience/{name}": _V1_1["xxl"] for name in ("T0", "T0p", "T0pp")},
    "bigscience/T0_3B": _V1_1["xl"],
    **{f"meta-llama/Llama-{size}": fields for size, fields in _LLAMA3.items()},
    **{f"meta-llama/Llama-{size}-Instruct": fields for size, fields in _LLAMA3.items()},
    **{f"Qwen/Qwen3-{size}": fields for size, fields in _QWEN3.items()},
    **{f"Qwen/Qwen3-{size}-Base": fields for size, fields in _QWEN3.items()},
    **{f"google/gemma-3-{size}-pt": fields for size, fields in _GEMMA3.items()},
    **{f"google/gemma-3-{size}-it": fields for size, fields in _GEMMA3.items()},
    **{f"HuggingFaceTB/SmolLM2-{size}": fields for size, fields in _SMOLLM2.items()},
    **{f"HuggingFaceTB/SmolLM2-{size}-Instruct": fields for size, fields in _SMOLLM2.items()},
}
