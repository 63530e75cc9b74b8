"""Rows of decoder-only backbones: beginnings, ends, boundaries, and padding that no id tells."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fast_tokenizers import BEGIN, END, make_tokenizer
from transformers import AutoTokenizer

from mhr_scale.config import BatchConfig
from mhr_scale.families.causal import CAUSAL, begin_of
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.table import make_config
from mhr_scale.rows.encode import Encoder
from mhr_scale.tasks.task import Example, Task


def encode(tokenizer: Any, text: str, target: str = "yes", **lengths: int) -> EncodedRow:
    task = Task(name="t", train=(Example(id="x", input=text, targets=(target,)),))
    (row,) = Encoder(task, tokenizer, BatchConfig(**lengths), CAUSAL).rows(task.train)
    return row


def words(tokenizer: Any, row: EncodedRow) -> tuple[str, str]:
    prompt, (answer,) = row.input_ids, row.answers
    return tokenizer.decode(prompt.tolist()), tokenizer.decode(answer.tolist())


@pytest.mark.parametrize(
    ("frame", "more", "begin"),
    [
        ("llama 3", {}, [0]),
        ("gpt 2", {}, []),
        ("both", {}, [0]),
        ("end only", {}, []),
        ("end only", {"bos_token": END}, []),
        ("gpt 2", {"bos_token": END}, []),
        ("two", {}, [0, 0]),
        ("gpt 2", {"bos_token": None}, []),
    ],
)
def test_a_prompt_begins_as_its_tokenizer_begins_texts(
    frame: str, more: dict[str, Any], begin: list[int]
) -> None:
    tokenizer = make_tokenizer(frame, **more)
    assert begin_of(tokenizer) == begin
    row = encode(tokenizer, "ab")
    assert row.input_ids.tolist() == begin + tokenizer.convert_tokens_to_ids(["a", "b"])
    assert row.answers[0].tolist() == [*tokenizer.convert_tokens_to_ids(["y", "e", "s"]), 1]


def test_smollm2_begins_no_text_and_ends_targets(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "backbones" / "smollm2_135m")
    row = encode(tokenizer, "The capital of France is", " Paris")
    assert words(tokenizer, row) == ("The capital of France is", " Paris<|im_end|>")


def test_prompt_and_target_are_tokenised_apart() -> None:
    tokenizer = make_tokenizer()
    row = encode(tokenizer, "answer:", "yes")
    apart = [*row.input_ids.tolist(), *row.answers[0].tolist()]
    joined = tokenizer("answer:yes").input_ids
    assert tokenizer.decode(apart) == f"{BEGIN}answer:yes{END}"
    assert len(apart) - 1 == len(joined) + 1  # together, the colon would have merged with the y


@pytest.mark.parametrize(
    ("frame", "limit", "expected"),
    [
        ("gpt 2", 4, "abcd"),
        ("gpt 2", 3, "bcd"),
        ("llama 3", 5, f"{BEGIN}abcd"),
        ("llama 3", 4, f"{BEGIN}bcd"),
    ],
)
def test_the_limit_counts_the_beginning_where_there_is_one(
    frame: str, limit: int, expected: str
) -> None:
    tokenizer = make_tokenizer(frame)
    assert words(tokenizer, encode(tokenizer, "abcd", max_input_tokens=limit))[0] == expected


def test_a_prompt_without_a_token_is_an_end() -> None:
    tokenizer = make_tokenizer("gpt 2")
    assert encode(tokenizer, "", max_input_tokens=1).input_ids.tolist() == [1]


# -- padding ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama with random weights that pads with its end of sequence, 1."""
    fields = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    family, config, _ = make_config({"model_type": "llama", **fields, "pad_token_id": 1})
    assert (config.pad_token_id, config.eos_token_id) == (1, 1)
    made = family.build(config).eval()
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_a_token_of_a_text_is_read_though_rows_are_padded_with_it(model: Any) -> None:
    tokenizer = make_tokenizer()
    texts = [f"{END}a{END}{END}bc{END}", "a longer text than the other one", END]
    targets = ["x", f"y{END}{END}", f"{END}z"]
    rows = [encode(tokenizer, text, target) for text, target in zip(texts, targets, strict=True)]
    assert [int((row.input_ids == 1).sum()) for row in rows] == [4, 0, 1]
    together = CAUSAL.pack(rows, model.config)
    logits = CAUSAL.logits(model, together)
    for number, row in enumerate(rows):
        prompt, (answer,) = row.input_ids, row.answers
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
        alone = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[number, : len(answer)], alone, rtol=1e-4, atol=1e-5)
        assert together.labels_BD[number, : len(answer)].tolist() == answer.tolist()
        assert (together.labels_BD[number, len(answer) :] == -100).all()


def test_generation_ends_at_any_of_several_ends_and_reads_ends_in_prompts(model: Any) -> None:
    rows = [EncodedRow(np.array([5, 1, 1])), EncodedRow(np.array([9, 8, 7, 1, 6]))]
    device, free = torch.device("cpu"), {"max_new_tokens": 6, "do_sample": False}

    def generate(rows: list[EncodedRow], ends: int | list[int]) -> list[list[int]]:
        model.config.eos_token_id = ends
        try:
            return CAUSAL.generate(model, rows, device=device, **free)
        finally:
            model.config.eos_token_id = 1

    written = generate(rows, 299)
    assert [generate([row], 299)[0] for row in rows] == written
    second = written[0][1]
    place = written[0].index(second)
    assert generate([rows[0]], [299, second])[0] == written[0][:place]
    assert len(written[0]) == 6
