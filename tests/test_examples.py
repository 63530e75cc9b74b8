"""The worked examples in docs/examples: their files, commands and code, with tiny backbones."""

import json
import re
from pathlib import Path

import pytest
from fast_tokenizers import TEMPLATE, make_tokenizer
from held_out_files import RTE, RTE_TEMPLATES, write_rows, write_templates
from processes import ROOT, read_metrics, succeed_together
from safetensors.torch import load_file
from small_causal import small_causal
from small_t5 import small_t5
from tours import Tour, blocks, commands_in
from transformers import ByT5Tokenizer

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
        "pretrain": (*STEPS, BATCH, "tasks={suite: t0, source: p3, missing: skip}"),
        "average": ("steps=[0, 2]",),
    },
    "from_peft": {},
}


def page(name: str) -> str:
    text = (EXAMPLES / f"{name}.md").read_text(encoding="utf-8")
    return text.replace(HUB, TINY).replace("max_steps=20", "max_steps=2")


def write_causal(folder: Path) -> None:
    """A Llama of a few thousand weights with a tokenizer of bytes."""
    tokenizer = make_tokenizer("gpt 2", chat_template=TEMPLATE)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all pages have been followed, in one process, which takes the time of its imports
    once; what they printed is in `printed.txt`."""
    folder = tmp_path_factory.mktemp("examples")
    write_causal(folder / TINY)
    write_t0(folder)
    steps: list[list[str]] = []
    for name, shorter in SHORTER.items():
        steps += Tour(folder, shorter).steps_of(name, page(name))
    printed = succeed_together(steps, folder, inside=folder)
    (folder / "printed.txt").write_text(printed)
    return folder


def test_every_example_is_followed_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.md")} == SHORTER.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTER)
def test_the_commands_of_an_example_leave_what_they_should(name: str, folder: Path) -> None:
    tour = Tour(folder, SHORTER[name])
    for command in commands_in("".join(blocks(page(name), "bash"))):
        tour.check(command)


@pytest.mark.slow
def test_own_tasks_become_adapters_that_peft_serves(folder: Path) -> None:
    assert [line["step"] for line in read_metrics(folder / "runs" / "my_tasks")] == [1, 2]
    summary = json.loads((folder / "runs" / "my_scores" / "summary.json").read_text())
    assert summary["tasks"].keys() == {"capital", "plural", "sentiment"}
    names = {path.name for path in (folder / "exports" / "my_tasks").iterdir() if path.is_dir()}
    assert names == {"capital", "plural", "sentiment"}


@pytest.mark.slow
def test_t0_becomes_a_table(folder: Path) -> None:
    printed = (folder / "printed.txt").read_text()
    assert re.search(r"task +k = 0 +k = 2 +bare +chance\nrte ", printed)


@pytest.mark.slow
def test_a_lora_of_peft_becomes_mhr_and_loras_again(folder: Path) -> None:
    tensors = [
        load_file(folder / "exports" / "from_mhr" / task / "adapter_model.safetensors")
        for task in ("capital", "plural")
    ]
    assert all(one.any() for name, one in tensors[0].items() if "lora_B" in name)
    assert any(not one.equal(tensors[1][name]) for name, one in tensors[0].items())
