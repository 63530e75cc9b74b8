"""The texts by which a vocabulary is compared with another reading of it."""

import pytest
import sentencepiece
from small_pieces import T5_IDS, train_pieces

from mhr_scale.backbone.sample_texts import ALPHABETS, make_texts

PIECES = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581the", "cat", "\u0301", "s", "<extra_id_0>"]


@pytest.fixture(scope="module")
def texts():
    return make_texts(PIECES)


def test_there_are_thousands_and_always_the_same(texts):
    assert len(texts) > 4000
    assert texts == make_texts(PIECES)
    assert texts != make_texts([*PIECES, "dog"])


def test_no_text_names_a_special_token(texts):
    assert not [text for text in texts if "<" in text]


def test_a_mark_follows_what_it_has_in_a_piece_alone(texts):
    assert not [text for text in texts if "s\u0301" in text or "cat\u0301" in text]


def test_what_has_other_spaces_is_there_with_single_ones_too(texts):
    single = {text for text in texts if text == " ".join(text.split())}
    others = [text for text in texts if text not in single]
    assert len(others) > 500
    assert all(" ".join(text.split()) in single for text in others)
    assert any(text[0].isspace() for text in others)
    assert any(text[-1].isspace() for text in others)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_every_alphabet_is_there(texts, alphabet):
    first, last = ALPHABETS[alphabet]
    assert any(all(first <= c <= last for c in text.split()[0]) for text in texts if text.split())


def test_cases_digits_and_rare_characters_are_there(texts):
    assert any(text.isupper() and "CAT" in text for text in texts)
    assert any("Cat" in text for text in texts)
    assert len({c for text in texts for c in text}) > 5000
    assert sum(text[0].isdigit() for text in texts if text) > 400


def test_a_vocabulary_of_special_tokens_alone_has_texts_too():
    assert len(make_texts(["<pad>", "</s>", "<unk>"])) > 4000


def test_every_text_can_be_read(tmp_path):
    """No half of a surrogate pair, for example."""
    file = train_pieces(tmp_path, **T5_IDS)
    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    texts = make_texts(original.id_to_piece(list(range(original.get_piece_size()))))
    assert len(original.encode(texts)) == len(texts)
