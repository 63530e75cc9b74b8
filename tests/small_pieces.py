"""Vocabularies of a few hundred pieces, as sentencepiece writes them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from processes import ROOT

from mhr_scale.backbone.sample_texts import WORDS

T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def train_pieces(place: Path, lines: Iterable[str] = (), **settings: Any) -> Path:
    """A vocabulary of these lines, by default the README's, in a file as T5 calls it."""
    lines = list(lines) or (ROOT / "README.md").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()] + [WORDS] * 10),
        model_prefix=str(place / "spiece"),
        num_threads=1,
        minloglevel=2,
        **{"vocab_size": 280, **settings},
    )
    return place / "spiece.model"
