"""Rows of a conversation: `messages`, a list of `{"role": ..., "content": ...}`.

Every turn of the assistant is a target, and what stands before it is what it answers: a row makes
as many examples as it has such turns. They are one raw row under several prompts: they count once,
stay together, and an epoch of few-shot jobs draws one of them.
"""

from collections.abc import Sequence
from typing import Any

from mhr_scale.errors import did_you_mean
from mhr_scale.tasks.json_lines import kind_of
from mhr_scale.tasks.task import Example, Place, Turn

ROLES = ("system", "user", "assistant", "tool")
#: What a turn may not have, since no text would show it.
CALLS = ("tool_calls", "function_call")


def find_problem(turns: Sequence[Any]) -> str | None:
    """Why messages are refused, if they are; turns are counted from 1."""
    before: list[str] = []
    for number, turn in enumerate(turns, start=1):
        problem = _turn_problem(turn) or _order_problem(turn["role"], before)
        if problem is not None:
            return f"messages: turn {number}{problem}"
        before.append(turn["role"])
    return None if "assistant" in before else "messages: no turn of the assistant to learn from"


def make_examples(turns: Sequence[dict[str, str]], *, id: str, place: Place) -> list[Example]:
    """An example for each turn of the assistant, in their order."""
    told = [Turn(role=turn["role"], content=turn["content"]) for turn in turns]
    answers = [number for number, turn in enumerate(told) if turn.role == "assistant"]
    examples = []
    for count, number in enumerate(answers, start=1):
        prompt = f"turn {count}" if len(answers) > 1 else ""
        asked = told[number - 1]
        examples.append(
            Example(
                id=f"{id}/{prompt}" if prompt else id,
                prompt=prompt,
                input=asked.content,
                role=asked.role,
                history=tuple(told[: number - 1]),
                targets=(told[number].content,),
                place=place,
            )
        )
    return examples


def _turn_problem(turn: Any) -> str | None:
    if not isinstance(turn, dict):
        return f" is {kind_of(turn)}, expected an object of role and content"
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            wrong = f"is {kind_of(turn[key])}, expected a string" if key in turn else "is missing"
            return f": '{key}' {wrong}"
    if turn["role"] not in ROLES:
        known = f"{did_you_mean(turn['role'], ROLES)}; known: {', '.join(ROLES)}"
        return f": unknown role {turn['role']!a}{known}"
    if not turn["content"].strip():
        return f": the {turn['role']} says nothing"
    calls = next((key for key in CALLS if turn.get(key)), None)
    return None if calls is None else f": '{calls}' is not read; write calls into the content"


def _order_problem(role: str, before: Sequence[str]) -> str | None:
    if role == "system" and before:
        return ": the system speaks first or not at all"
    if role == "assistant" and (not before or before[-1] not in ("user", "tool")):
        return ": the assistant answers nobody; a turn of the user or a tool comes before it"
    return None
