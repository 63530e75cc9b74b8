"""Inputs in a tokenizer's chat template: their whole text, and what of it may be cut.

A conversation is rendered by `apply_chat_template` up to where the assistant is to answer. What the
template writes around the texts is found by rendering marks in their place.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhr_scale.errors import ConfigError, DataError, first_line, shortened
from mhr_scale.tasks.task import Chat, Example

#: Stands for what a turn says; no text has it, and no template changes it.
MARK = "mArKoFtUrN{}eNd"
#: What templates call to write today's date, and what answers here: rows are the same tomorrow.
TODAY = "strftime_now"
A_DAY = f"{{%- macro {TODAY}(format) -%}}26 Jul 2024{{%- endmacro -%}}"


@dataclass(frozen=True, slots=True)
class Framed:
    """A text as pieces that always stay, and the text behind each that may be cut.

    There is one piece more than texts: a text stands between two.
    """

    pieces: tuple[str, ...]
    texts: tuple[str, ...]


class ChatTemplate:
    """The chat template of a tokenizer, behind the system text of a suite.

    Raises `ConfigError` if the tokenizer has none, or none that takes the system text.
    """

    def __init__(self, tokenizer: Any, chat: Chat) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "tasks.chat: true, but the tokenizer has no chat template; set tasks.chat: false, "
                "or name a tokenizer with one under backbone.tokenizer"
            )
        self._tokenizer, self._chat = tokenizer, chat
        template: str = tokenizer.get_chat_template()
        self._template = A_DAY + template if TODAY in template else template
        question = Example(id="", input=MARK.format(0), targets=())
        turns = self._turns(question)
        try:
            text = self._render(turns)
        except Exception as error:
            setting = "tasks.chat" if chat.system is None else "tasks.system"
            raise ConfigError(
                f"{setting}: the tokenizer's chat template refuses it ({first_line(error)})"
            ) from error
        lost = next((turn for turn in turns if not _shows(text, turn["content"])), None)
        if lost is not None:
            setting = "system" if lost["role"] == "system" else "chat"
            raise ConfigError(
                f"tasks.{setting}: the tokenizer's chat template leaves out what the "
                f"{lost['role']} says; leave the setting out"
            )

    def text(self, example: Example) -> str:
        """The conversation of a row; raises `DataError` if the template refuses it."""
        turns = self._turns(example)
        try:
            text = self._render(turns)
        except Exception as error:
            raise self._refused(example, f"refuses it: {first_line(error)}") from error
        # what an assistant thought is left out of its past turns by some templates
        for turn in turns:
            if turn["role"] != "assistant" and not _shows(text, turn["content"]):
                said = shortened(turn["content"])
                raise self._refused(example, f"leaves out what the {turn['role']} says: {said}")
        return text

    def frame(self, example: Example) -> Framed:
        """The same conversation, apart: system texts stay, all others may be cut."""
        turns = self._turns(example)
        can_be_cut = [turn["role"] != "system" for turn in turns]
        marks = [MARK.format(number) for number in range(len(turns))]
        text = self.text(example)
        marked = self._render(
            [
                {**turn, "content": mark} if is_cut else turn
                for turn, mark, is_cut in zip(turns, marks, can_be_cut, strict=True)
            ]
        )
        pieces, rest = [], marked
        for mark, is_cut in zip(marks, can_be_cut, strict=True):
            if is_cut:
                piece, found, rest = rest.partition(mark)
                if not found:
                    raise self._refused(example, "moves its turns about, so that none can be cut")
                pieces.append(piece)
        texts = _between((*pieces, rest), text)
        if texts is None:
            raise self._refused(example, "writes other words around its turns by what they say")
        return Framed((*pieces, rest), texts)

    def _turns(self, example: Example) -> list[dict[str, str]]:
        turns = [{"role": turn.role, "content": turn.content} for turn in example.history]
        if self._chat.system is not None and not any(t["role"] == "system" for t in turns):
            turns.insert(0, {"role": "system", "content": self._chat.system})
        return [*turns, {"role": example.role, "content": example.input}]

    def _render(self, turns: Sequence[dict[str, str]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(turns),
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text

    @staticmethod
    def _refused(example: Example, why: str) -> DataError:
        place = example.place or f"example {example.id}"
        return DataError(f"{place}: the chat template {why}; mend the row or leave it out")


def _shows(text: str, content: str) -> bool:
    """Whether a template has written what a turn says, as it is or as JSON."""
    content = content.strip()
    return content in text or json.dumps(content)[1:-1] in text


def _between(pieces: Sequence[str], text: str) -> tuple[str, ...] | None:
    """What stands between the pieces in a text that begins with the first, ends with the last."""
    first, *inner, last = pieces
    if not (text.startswith(first) and text.endswith(last)):
        return None
    texts, rest = [], text[len(first) : len(text) - len(last)]
    for piece in inner:
        part, found, rest = rest.partition(piece)
        if not found:
            return None
        texts.append(part)
    return (*texts, rest)
