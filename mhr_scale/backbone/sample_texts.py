"""Texts to compare two readings of a vocabulary by: always the same for the same vocabulary.

Left out is what every `tokenizer.json` reads otherwise than sentencepiece, whatever the vocabulary:
names of special tokens, marks behind a character that is itself written otherwise, and U+0085.
"""

import random
import unicodedata
from collections.abc import Iterator, Sequence

from mhr_scale.seeds import seed_from

#: Texts of each kind.
N_TEXTS = 500
#: What sentencepiece writes for a space.
SPACE = "\u2581"
#: First and last letters of alphabets.
ALPHABETS = {
    "Latin": "\u00c0\u024f",
    "Greek": "\u0391\u03c9",
    "Cyrillic": "\u0400\u045f",
    "Armenian": "\u0531\u0587",
    "Hebrew": "\u05d0\u05ea",
    "Arabic": "\u0620\u064a",
    "Devanagari": "\u0904\u0939",
    "Bengali": "\u0985\u09b9",
    "Tamil": "\u0b85\u0bb9",
    "Thai": "\u0e01\u0e2e",
    "Georgian": "\u10d0\u10f0",
    "Ethiopic": "\u1200\u1357",
    "Kana": "\u3041\u30fe",
    "Han": "\u4e00\u9fa5",
    "Hangul": "\uac00\ud7a3",
}
JOINTS = (" ", ", ", ". ", "; ", ": ", "? ", "! ", "-", "/", "'", '"', " (", ") ", "%", "&", "=")
SPACES = (" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2003", "\u3000")
WORDS = "the question is which of these 3.5 % are (un)believable, and why there were no others"


def make_texts(pieces: Sequence[str]) -> list[str]:
    """A few thousand texts, made of a vocabulary's pieces and of what no vocabulary has.

    Some have spaces in a row or at an end; each of those is there with single spaces too.
    """
    usable = [piece for piece in pieces if "<" not in piece and not _begins_with_mark(piece)]
    usable.append("a")
    words = [word for piece in usable if (word := piece.replace(SPACE, ""))]
    plain = [WORDS]
    for number in range(N_TEXTS):
        draw = random.Random(seed_from("sample text", number))
        sequence = "".join(draw.choices(usable, k=16)).replace(SPACE, " ")
        joined = "".join(draw.choice(words) + draw.choice(JOINTS) for _ in range(8))
        of_pieces = [sequence, joined, *_cases(draw.choice((sequence, joined)))]
        plain += [unicodedata.normalize("NFKC", text) for text in of_pieces]
        plain += [_numbers(draw), _foreign(draw), _rare(draw)]
    plain = [" ".join(text.split()) for text in plain]
    return [*plain, *(_spaced(text, n) for n, text in enumerate(plain[: 2 * N_TEXTS]))]


def _begins_with_mark(piece: str) -> bool:
    first = piece.lstrip(SPACE)[:1]
    return first != "" and unicodedata.category(first).startswith("M")


def _is_space_or_half(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) == "Cs"  # a surrogate


def _cases(text: str) -> Iterator[str]:
    yield from (text.lower(), text.upper(), text.title())


def _numbers(draw: random.Random) -> str:
    """Numbers of all lengths, with and without separators."""
    a, b, c, d = (draw.randrange(10 ** draw.randrange(1, 10)) for _ in range(4))
    return f"{a} {b:,} {c / 100:.2f} {d:05d}/{draw.random():.3f}"


def _foreign(draw: random.Random) -> str:
    """Words of random letters of one alphabet."""
    first, last = map(ord, draw.choice(list(ALPHABETS.values())))
    letters = [character for character in map(chr, range(first, last + 1)) if character.isalpha()]
    return " ".join("".join(draw.choices(letters, k=draw.randrange(1, 8))) for _ in range(6))


def _rare(draw: random.Random) -> str:
    """Characters of all of Unicode, each between plain letters."""
    characters = [chr(draw.randrange(1, draw.choice((0x3000, 0x20000)))) for _ in range(8)]
    return " ".join(f"a{c}b" for c in characters if c != "<" and not _is_space_or_half(c))


def _spaced(text: str, number: int) -> str:
    """A text with other spaces between its words, and at its ends."""
    draw = random.Random(seed_from("spaced text", number))
    words = text.split(" ")
    ends = [draw.choice(("", *SPACES)) for _ in range(2)]
    return ends[0] + "".join(w + draw.choice(SPACES) for w in words[:-1]) + words[-1] + ends[1]
