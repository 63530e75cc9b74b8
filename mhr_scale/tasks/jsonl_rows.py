"""One row of the user's own: its fields, what is wrong with it, the examples it makes."""

import logging
from collections.abc import Mapping
from typing import Any

from mhr_scale.errors import did_you_mean, shortened
from mhr_scale.tasks import messages
from mhr_scale.tasks.json_lines import JsonLine, kind_of
from mhr_scale.tasks.task import Example, IntakeConfig

log = logging.getLogger("mhr_scale")

FIELDS: dict[str, type] = {
    "input": str,
    "target": str,
    "task": str,
    "id": str,
    "prompt": str,
    "targets": list,
    "choices": list,
    "label": int,
    "meta": dict,
    "messages": list,
}
REQUIRED = ("input", "target")
#: Fields that stand in a row of messages.
BESIDE_MESSAGES = ("messages", "task", "id", "meta")
#: Fields that cells of text hold as JSON.
STRUCTURED = tuple(name for name, kind in FIELDS.items() if kind is not str)


def rename(line: JsonLine, names: Mapping[str, str]) -> JsonLine:
    """The row with fields by our names; `names` are those of the file where they differ."""
    others = {name: value for name, value in line.row.items() if name not in names}
    theirs = set(names.values())
    row = {name: value for name, value in others.items() if name not in theirs}
    row |= {ours: line.row[name] for ours, name in names.items() if name in line.row}
    return JsonLine(place=line.place, text=line.text, row=row)


def warn_unknown(line: JsonLine, seen: set[str]) -> None:
    """Tell of each key of a file, once, that is no field."""
    for key in line.row.keys() - FIELDS.keys() - seen:
        seen.add(key)
        log.warning("%s: unknown key %a is not read%s", line.place, key, did_you_mean(key, FIELDS))


def find_problem(
    row: dict[str, Any],
    *,
    names: Mapping[str, str],
    fold: str,
    has_task: bool,
    in_chat: bool,
    policy: IntakeConfig,
) -> str | None:
    """Why a row is refused, if it is."""
    if row.get("messages") is None:
        return (
            _type_problem(row, REQUIRED, names)
            or _task_problem(row, has_task=has_task)
            or policy.find_empty(row["input"], [row["target"], *(row.get("targets") or ())])
            or _choice_problem(row, fold=fold)
        )
    beside = [name for name in FIELDS if name not in BESIDE_MESSAGES and row.get(name) is not None]
    if beside:
        return f"'{beside[0]}' beside 'messages'; a row is one or the other"
    if not in_chat:
        return "'messages' are a conversation: set tasks.chat: true"
    return (
        _type_problem(row, (), names)
        or _task_problem(row, has_task=has_task)
        or messages.find_problem(row["messages"])
    )


def make_examples(line: JsonLine, *, default_id: str) -> list[Example]:
    """The example of a row, or one for each turn of the assistant in its messages."""
    row = line.row
    id = default_id if row.get("id") is None else row["id"]
    if row.get("messages") is not None:
        return messages.make_examples(row["messages"], id=id, place=line.place)
    target, label = row["target"], row.get("label")
    choices = tuple(row.get("choices") or ())
    if choices and label is None:
        label = choices.index(target)
    others = (text for text in row.get("targets") or () if text != target)
    prompt = row.get("prompt") or ""
    example = Example(
        id=f"{id}/{prompt}" if prompt else id,
        prompt=prompt,
        input=row["input"],
        targets=(target, *others),
        choices=choices,
        label=label,
        place=line.place,
    )
    return [example]


def _type_problem(
    row: dict[str, Any], required: tuple[str, ...], names: Mapping[str, str]
) -> str | None:
    for key, kind in FIELDS.items():
        value, name = row.get(key), names.get(key, key)
        if key in required and key not in row:
            near = next((other for other in row if other.startswith(name)), None)
            way_out = f"; to read '{near}', set tasks.fields: {{{key}: {near}}}" if near else ""
            return f"missing field '{name}'{way_out}"
        if value is None and key not in required:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "an integer" if kind is int else kind_of(kind())
            return f"'{name}' is {kind_of(value)}, expected {wanted}"
    for key in ("targets", "choices"):
        for entry in row.get(key) or ():
            if not isinstance(entry, str):
                return f"'{names.get(key, key)}' holds {kind_of(entry)}, expected strings only"
    return None


def _task_problem(row: dict[str, Any], *, has_task: bool) -> str | None:
    if row.get("task") is None and not has_task:
        return "missing field 'task' (the file lies in no task's folder)"
    if row.get("task") == "":
        return "empty task"
    for key in ("task", "prompt"):
        if not (row.get(key) or "").isprintable():
            return f"{key} {row[key]!a} has a character that cannot be printed"
    if row.get("prompt") is not None and row.get("id") is None:
        return "a 'prompt' without the 'id' of its raw row"
    return None


def _choice_problem(row: dict[str, Any], *, fold: str) -> str | None:
    label, target = row.get("label"), row["target"]
    choices = row.get("choices") or []
    if label == -1 and fold == "test":
        return "label -1 (hidden test label) cannot be scored"
    if not choices:
        return None if label is None else "label without choices"
    if len(set(choices)) < 2:
        return "fewer than two different choices"
    if label is not None and not 0 <= label < len(choices):
        return f"label {label} is out of range for {len(choices)} choices"
    if target not in choices:
        return f"target {shortened(target)} is not among the choices"
    if label is not None and choices[label] != target:
        return f"label {label} is {shortened(choices[label])} but the target is {shortened(target)}"
    return None
