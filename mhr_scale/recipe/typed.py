"""Type-checked dataclasses from the plain values of a file.

Dataclasses do not check types: values from a file are checked here, once, before they are used.
"""

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(kind: type[T], values: Any, *, name: str) -> T:
    """Make a dataclass of plain values; errors call them `name`.

    Raises `TypeError` naming a field that is unknown, missing or of another type, and whatever the
    dataclass itself raises.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{name} is {values!r}, no object")
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key in hints and not _is_a(value, hints[key]):
            raise TypeError(f"{name}.{key} is {value!r}")
    return kind(**values)


def check_fields(values: Any, hints: Mapping[str, Any], *, name: str) -> None:
    """Raise `TypeError` naming a field that is missing or of another type than its hint."""
    if not isinstance(values, dict):
        raise TypeError(f"{name} is {values!r}, no object")
    for key, hint in hints.items():
        if key not in values:
            raise TypeError(f"{name}.{key} is missing")
        if not _is_a(values[key], hint):
            raise TypeError(f"{name}.{key} is {values[key]!r}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; floats must be finite, and integers count as floats."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, member) for member in typing.get_args(hint))
    if origin is tuple:  # of any length, which JSON has as a list
        inner = typing.get_args(hint)[0]
        return isinstance(value, list) and all(_is_a(part, inner) for part in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint
