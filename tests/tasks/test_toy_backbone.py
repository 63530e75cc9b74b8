"""The backbone of the toy suite: its corpus, its vocabulary, and the folder that is shipped."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_tasks import CONFIG, everything, examples_of
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from mhr_scale.tasks import toy

FOLDER = Path(toy.__file__).parent / "toy_backbone"


# --- the backbone's corpus


def corpus(n_examples):
    rng = random.Random(0)
    return [toy.corpus_example(rng) for _ in range(n_examples)]


def kind_of(source):
    words = source.split()
    if "<extra_id_0>" in words:
        return "span"
    return "copy" if words[0] == "do:copy" else "primitive"


def test_the_corpus_is_a_fixed_function_of_its_generator():
    assert corpus(50) == corpus(50)


def test_a_fifth_of_the_corpus_is_span_corruption():
    share = sum(kind_of(source) == "span" for source, _ in corpus(5000)) / 5000
    assert share == pytest.approx(0.2, abs=0.02)


def test_three_fifths_of_the_corpus_are_single_primitives():
    share = sum(kind_of(source) == "primitive" for source, _ in corpus(5000)) / 5000
    # A fourteenth of them, the operation copy, looks like a copying example.
    assert share == pytest.approx(0.6 * 13 / 14, abs=0.02)


def test_the_corpus_never_composes_two_primitives():
    words = [set(source.split()) & set(toy.CONTROL_WORDS) for source, _ in corpus(5000)]
    assert max(len(control) for control in words) == 1


def test_a_control_word_names_what_makes_the_target():
    rng = random.Random(0)
    for _ in range(500):
        source, target = toy.primitive_example(rng)
        word, symbols = source.split(maxsplit=1)
        name = word.removeprefix("do:")
        composition = f"{name}.identity.plain" if name in toy.OPERATIONS else f"copy.{name}.plain"
        assert target == toy.compose(composition, symbols)


def test_a_corrupted_span_put_back_is_a_string_of_letters():
    for source, target in corpus(2000):
        if kind_of(source) == "span":
            hidden = target.removeprefix("<extra_id_0>").removesuffix("<extra_id_1>").split()
            whole = source.replace("<extra_id_0>", " ".join(hidden)).split()
            assert set(whole) <= set(toy.LETTERS)


def test_copying_meets_every_marker_and_instruction_word():
    copied = {
        w for source, target in corpus(5000) if kind_of(source) == "copy" for w in target.split()
    }
    assert copied == {*toy.LETTERS, "<", ">", *toy.INSTRUCTION_WORDS}


# --- the vocabulary


def test_the_vocabulary_has_at_most_53_symbols():
    assert len(toy.vocabulary()) <= 53


def test_no_symbol_is_in_the_vocabulary_twice():
    assert len(set(toy.vocabulary())) == len(toy.vocabulary())


@pytest.mark.parametrize("instruction", ["none", "full"])
def test_the_vocabulary_covers_every_text_of_every_task(instruction):
    config = replace(
        CONFIG, n_tasks=134, train_examples=20, validation_examples=2, instruction=instruction
    )
    texts = [
        text
        for task in everything(config)
        for example in examples_of(task)
        for text in (example.input, *example.targets, *example.choices)
    ]
    assert {symbol for text in texts for symbol in text.split()} <= set(toy.vocabulary())


def test_the_corpus_uses_the_whole_vocabulary_but_pad_eos_and_unk():
    used = {symbol for pair in corpus(5000) for text in pair for symbol in text.split()}
    assert used == set(toy.vocabulary()[3:])


# --- the shipped backbone


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def weights():
    return load_file(FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def model(weights):
    model = T5ForConditionalGeneration(T5Config.from_pretrained(FOLDER))
    # transformers 5 ties lm_head to the embedding on construction.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    stacks = {f"{s}.embed_tokens.weight": weights["shared.weight"] for s in ("encoder", "decoder")}
    model.load_state_dict({**weights, **stacks})
    return model.eval()


def test_the_shipped_folder_is_under_a_megabyte():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_000_000


def test_the_shipped_weights_are_bfloat16(weights):
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_the_shipped_head_is_not_the_embedding(weights):
    assert not torch.equal(weights["lm_head.weight"], weights["shared.weight"])


def test_the_shipped_configuration_does_not_scale_the_decoders_output():
    assert not T5Config.from_pretrained(FOLDER).scale_decoder_outputs


def test_the_shipped_tokens_are_numbered_like_the_vocabulary(tokenizer):
    symbols = toy.vocabulary()
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == symbols


def test_the_tokenizer_gives_back_every_text(tokenizer):
    texts = [text for pair in corpus(500) for text in pair]
    texts += [
        c for t in everything(replace(CONFIG, instruction="full")) for c in t.train[0].choices
    ]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


def test_the_tokenizer_appends_the_end_of_sequence(tokenizer):
    assert tokenizer("a b <")["input_ids"] == [5, 6, 17, tokenizer.eos_token_id]


def test_the_tokenizer_gives_only_what_the_model_takes(tokenizer):
    assert set(tokenizer("a b")) == {"input_ids", "attention_mask"}


def test_an_unknown_symbol_becomes_unk(tokenizer):
    assert tokenizer("z")["input_ids"] == [tokenizer.unk_token_id, tokenizer.eos_token_id]


@torch.no_grad()
def test_the_shipped_backbone_does_single_primitives(model, tokenizer):
    rng = random.Random(7)
    sources, targets = zip(*(toy.primitive_example(rng) for _ in range(200)))
    inputs = tokenizer(list(sources), padding=True, return_tensors="pt")
    labels = tokenizer(list(targets), padding=True, return_tensors="pt")
    masked = labels.attention_mask == 0
    logits = model(**inputs, labels=labels.input_ids.masked_fill(masked, -100)).logits
    right = ((logits.argmax(-1) == labels.input_ids) | masked).all(-1)
    assert right.float().mean() >= 0.95
