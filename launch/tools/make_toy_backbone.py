"""Train the backbone of the toy suite and write it to `mhr_scale/tasks/toy_backbone/`.

    python launch/tools/make_toy_backbone.py

Takes about three minutes on one CPU core. The result is a T5 v1.1 (untied `lm_head`, decoder output
not scaled) in bfloat16 that does every list operation and every symbol map of the suite on its own,
and has never seen two of them composed.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from mhr_scale.tasks import toy

FOLDER = Path(toy.__file__).parent / "toy_backbone"
SEED = 0
STEPS = 4000
WARMUP_STEPS = 200
BATCH_SIZE = 64
PEAK_LR = 3e-3
CLIP_NORM = 1.0
LOG_EVERY = 200
MEASURED_EXAMPLES = 2000

CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": len(toy.vocabulary()),
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 192,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "torch_dtype": "bfloat16",
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def main() -> None:
    """Train, write, and measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = write_tokenizer(folder)
    model = build_model()
    started = time.perf_counter()
    train(model, tokenizer)
    print(f"trained for {time.perf_counter() - started:.0f} s")
    write_model(model, folder)
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {n_bytes} bytes in {folder}")
    rounded = model.bfloat16().float()
    print(f"exact match on primitives, weights in bfloat16: {exact_match(rounded, tokenizer):.4f}")


def write_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Write the tokenizer, one token per blank-separated symbol, and read it back."""
    ids = {symbol: number for number, symbol in enumerate(toy.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    return AutoTokenizer.from_pretrained(folder)


def build_model() -> T5ForConditionalGeneration:
    """Return the untrained model, its `lm_head` a parameter of its own."""
    model = T5ForConditionalGeneration(T5Config(**CONFIG))
    # transformers 5 ties lm_head to the embedding on construction, whatever the config says.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def train(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train on the corpus, with linear warm-up and linear decay."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / STEPS)
    )
    model.train()
    for step in range(1, STEPS + 1):
        loss = model(
            **batch_of([toy.corpus_example(rng) for _ in range(BATCH_SIZE)], tokenizer)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY == 0:
            print(f"step {step} of {STEPS}, loss {loss.item():.4f}", flush=True)


def batch_of(
    pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Return padded inputs and labels, the labels' padding masked."""
    inputs, targets = zip(*pairs)
    batch = dict(tokenizer(list(inputs), padding=True, return_tensors="pt"))
    labels = tokenizer(list(targets), padding=True, return_tensors="pt")
    masked = labels["attention_mask"] == 0
    return {**batch, "labels": labels["input_ids"].masked_fill(masked, -100)}


@torch.no_grad()
def exact_match(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of fresh primitive examples whose greedy output is the target.

    Greedy decoding gives the target exactly if every token is the likeliest after its
    predecessors, so one teacher-forced pass is enough.
    """
    model.eval()
    rng = random.Random(SEED + 1)
    pairs = [toy.primitive_example(rng) for _ in range(MEASURED_EXAMPLES)]
    batch = batch_of(pairs, tokenizer)
    right = model(**batch).logits.argmax(-1) == batch["labels"]
    return (right | (batch["labels"] == -100)).all(-1).float().mean().item()


def write_model(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Write the weights in bfloat16 under their plain names.

    The stacks' `embed_tokens` are the embedding itself and are left out; `lm_head` stays.
    """
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("embed_tokens.weight")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: dict) -> None:
    """Write a configuration file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
