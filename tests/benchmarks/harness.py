"""lm-evaluation-harness by its own Hugging Face model under stock PEFT, and by ours.

[MHR_SHARED=FOLDER] python tests/benchmarks/harness.py [TURNS] [FOLDER ...]

The same requests to both: 4 choices behind each of 8 questions, which an instruction and two
examples come before, alike for all; 24 tokens more behind each question. A small Llama of random
weights (its tokens are bytes), and the models of the folders, in float32 with a LoRA on all linears
of the blocks: the averaged adapter of an MHR, as PEFT has it and as it is. Answers are compared
first (log-likelihoods to 1e-4 of the largest, texts whole), then the models take turns; times are
those of the processor, ratios medians over turns. The harness's model gets 16 requests a batch.
Needs `pip install "mhr_scale[lm-eval]"`.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch
from fast_tokenizers import make_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rank_causal import make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mhr_scale import AdapterConfig, attach, average, save_adapter
from mhr_scale.adapters import peft_folders
from mhr_scale.exchange.harness import RoutedLM

N_QUESTIONS, N_CHOICES, N_NEW = 8, 4, 24
INSTRUCTION = (
    "You are given a short story and a question about it. Choose the answer that fits the story "
    "best, and nothing else. Story: Anna takes the red bus to town every morning, and walks home "
    "along the river when the weather is fine. Question: how does Anna get to town? Answer: by bus."
    " Story: Tom has two dogs, a large one and a small one. Question: which of the dogs is older? "
    "Answer: that is not said.\n"
)
NAMES = ("Maria", "Peter", "Laura", "David")


def main() -> None:
    """Compare and time for each model in turn."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    turns = int(sys.argv[1]) if sys.argv[1:] else 5
    with tempfile.TemporaryDirectory() as folder:
        random = write_random(Path(folder) / "random")
        for number, backbone in enumerate([random, *map(Path, sys.argv[2:])]):
            compare(backbone, write_adapter(backbone, Path(folder) / str(number)), turns)


def write_random(folder: Path) -> Path:
    """The small Llama, with bytes for tokens: the harness drops words that a tokenizer lacks."""
    tokenizer = make_tokenizer()
    model = make_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 0, 1, 1
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(backbone: Path, folder: Path) -> Path:
    """An MHR that is not zero, and its average for PEFT."""
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    adapter = attach(model, AdapterConfig(rank=4, n_skills=4, n_splits=4), tasks=["a", "b"])
    for parameter in adapter.inventory.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    facts = {"name": str(backbone), "dtype": "float32"}
    save_adapter(adapter, folder / "adapter", backbone=facts)
    peft_folders.write_peft_lora(average(adapter), folder / "peft", base_model=str(backbone))
    return folder


def make_requests() -> dict[str, list[Any]]:
    """By kind."""
    asked: dict[str, list[Any]] = {"loglikelihood": [], "generate_until": []}
    options = {"until": ["\n\n\n"], "max_gen_toks": N_NEW}
    for number in range(N_QUESTIONS):
        name, other = NAMES[number % 4], NAMES[(number // 4 + 1) % 4]
        question = f"{INSTRUCTION}Story: {name} met {other} at {number} o'clock. Question: who met "
        question += f"{other}? Answer:"
        meta = ("task", number, 1)
        for choice in NAMES[:N_CHOICES]:
            pair = (question, f" {choice} did so.")
            asked["loglikelihood"].append(Instance("loglikelihood", {}, pair, 0, metadata=meta))
        pair = (question, dict(options))
        asked["generate_until"].append(Instance("generate_until", {}, pair, 0, metadata=meta))
    return asked


def compare(backbone: Path, folder: Path, turns: int) -> None:
    """One model: equal answers first, then times."""
    stock = HFLM(
        str(backbone), peft=str(folder / "peft"), dtype="float32", device="cpu", batch_size=16
    )
    own = RoutedLM(str(folder / "adapter"), device="cpu")
    length = len(AutoTokenizer.from_pretrained(backbone)(INSTRUCTION).input_ids)
    print(
        f"{backbone.name}: {stock.model.num_parameters() / 1e6:.0f} million weights, {length} alike"
    )
    for kind, requests in make_requests().items():
        answers = [getattr(lm, kind)(requests, disable_tqdm=True) for lm in (stock, own)]
        check(kind, *answers)
        times: list[list[float]] = [[], []]
        for _ in range(turns):
            for lm, seconds in zip((stock, own), times, strict=True):
                begun = time.process_time()
                getattr(lm, kind)(requests, disable_tqdm=True)
                seconds.append(time.process_time() - begun)
        ratio = statistics.median(theirs / ours for theirs, ours in zip(*times, strict=True))
        rates = [len(requests) / statistics.median(seconds) for seconds in times]
        print(
            f"  {kind:<16}{rates[0]:8.2f} requests/s by hf with peft {rates[1]:8.2f} by mhr_scale"
            f"   {ratio:.2f} times as fast"
        )


def check(kind: str, theirs: list[Any], ours: list[Any]) -> None:
    """Stop unless the answers are the same."""
    if kind == "generate_until":
        assert theirs == ours, [pair for pair in zip(theirs, ours, strict=True) if len({*pair}) > 1]
        return
    values = [torch.tensor([value for value, _ in answers]) for answers in (theirs, ours)]
    furthest = (values[0] - values[1]).abs().max().item()
    assert furthest < 1e-4 * max(1.0, values[0].abs().max().item()), furthest
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    print(f"  furthest log-likelihood {furthest:.0e} of {values[0].abs().max():.0f} nats")


if __name__ == "__main__":
    main()
