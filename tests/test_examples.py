"""The worked examples in docs/examples: their files, commands and code, with tiny backbones."""

import json
from pathlib import Path

import pytest
from fast_tokenizers import make_tokenizer
from held_out_files import RTE, RTE_TEMPLATES, write_rows, write_templates
from peft import PeftModel
from processes import ROOT, read_metrics
from small_causal import small_causal
from small_t5 import small_t5
from tours import Tour
from transformers import AutoModelForCausalLM, ByT5Tokenizer

EXAMPLES = ROOT / "docs" / "examples"
#: In the place of the hub's models.
HUB, TINY = "HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"
TINY_T5 = "tiny_t5"
STEPS = ("schedule={steps: 2}", "run.log_every=1")
BATCH = "batch={batch_size: 4, micro_batch_size: 4, max_input_tokens: 48, max_target_tokens: 16}"
#: What makes the commands of a page short, or lets them do without the hub.
SHORTER = {
    "own_tasks": {"pretrain": STEPS, "evaluate": ("scoring.max_new_tokens=2",)},
    "t0_11b": {
        "convert": (f"backbone={{name: {TINY_T5}}}",),
        "plan": ("workload.steps=2",),
        "pretrain": (*STEPS, BATCH, "tasks={suite: t0, source: p3, missing: skip}"),
        "average": ("steps=[0, 2]",),
    },
    "from_peft": {},
}


def page(name: str) -> str:
    text = (EXAMPLES / f"{name}.md").read_text(encoding="utf-8")
    return text.replace(HUB, TINY).replace("max_steps=20", "max_steps=2, use_cpu=True")


def write_causal(folder: Path) -> None:
    """A Llama of a few thousand weights with a tokenizer of bytes."""
    tokenizer = make_tokenizer("gpt 2")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    small_causal("llama", **sizes, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_t0(folder: Path) -> None:
    """A T5 of a few thousand weights, rows of two prompts of P3, and one held-out task."""
    small_t5().save_pretrained(folder / TINY_T5)
    ByT5Tokenizer().save_pretrained(folder / TINY_T5)
    for prompt in ("ag_news_classify", "quarel_do_not_use"):
        lines = [
            {"inputs_pretokenized": f"{prompt} {n}?", "targets_pretokenized": f"{n % 2}"}
            for n in range(12)
        ]
        write_rows(folder / "p3" / prompt / "train.jsonl", *lines)
    write_templates(folder / "data", "super_glue", "rte", *RTE_TEMPLATES)
    write_rows(folder / "data" / "t0_eval" / "rte.validation.jsonl", RTE, {**RTE, "idx": 8})


def follow(name: str, folder: Path) -> str:
    return Tour(folder, SHORTER[name]).follow_page(page(name))


def test_every_example_is_followed_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.md")} == SHORTER.keys()


@pytest.mark.slow
def test_own_tasks_become_adapters_that_peft_serves(tmp_path: Path) -> None:
    write_causal(tmp_path / TINY)
    printed = follow("own_tasks", tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "my_tasks")] == [1, 2]
    scores = json.loads((tmp_path / "runs" / "my_scores" / "summary.json").read_text())
    assert {"capital", "plural", "sentiment"} <= set(json.dumps(scores).split('"'))
    assert printed


@pytest.mark.slow
def test_t0_becomes_a_table(tmp_path: Path) -> None:
    write_t0(tmp_path)
    printed = follow("t0_11b", tmp_path)
    assert "rte" in printed
    assert "chance" in printed


@pytest.mark.slow
def test_a_lora_of_peft_becomes_mhr_and_loras_again(tmp_path: Path) -> None:
    write_causal(tmp_path / TINY)
    follow("from_peft", tmp_path)
    loras = []
    for task in ("capital", "plural"):
        backbone = AutoModelForCausalLM.from_pretrained(tmp_path / TINY)
        model = PeftModel.from_pretrained(backbone, tmp_path / "exports" / "from_mhr" / task)
        loras.append({name: p for name, p in model.named_parameters() if "lora_B" in name})
    assert all(p.any() for p in loras[0].values())
    assert any(not p.equal(loras[1][name]) for name, p in loras[0].items())
