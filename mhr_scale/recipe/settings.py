"""The settings of a recipe's parts: their names, their types as a recipe spells them, their help.

The text under a field is its help.
"""

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any


def help_text(schema: type[Any], prefix: str = "") -> str:
    """Every setting with its type, default and help line."""
    lines = []
    hints = typing.get_type_hints(schema)
    helps = field_helps(schema)
    for item in fields(schema):
        named = named_part(hints[item.name])
        if named is not None:
            lines.append(help_text(named, f"{prefix}{item.name}.NAME."))
            continue
        kinds = parts_of(hints[item.name])
        if kinds:
            lines += [help_text(kind, f"{prefix}{item.name}.") for kind in kinds]
            continue
        if item.default is not MISSING:
            default = f"default {as_written(item.default)}"
        elif item.default_factory is not MISSING:
            default = f"default {as_written(item.default_factory())}"
        else:
            default = "required"
        text = " ".join(helps.get(item.name, "").split())
        kind = kind_as_written(hints[item.name])
        lines.append(f"{prefix}{item.name}: {kind} ({default})\n    {text}\n")
    return "".join(lines)


def settings_of(schema: type[Any], prefix: str = "") -> frozenset[str]:
    """The dotted names of all settings of a recipe, but for those of parts with a name."""
    names: set[str] = set()
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        kinds = parts_of(hints[item.name])
        for kind in kinds:
            names |= settings_of(kind, f"{prefix}{item.name}.")
        if not kinds:
            names.add(f"{prefix}{item.name}")
    return frozenset(names)


def as_written(value: Any) -> str:
    """A value as a recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def kind_as_written(kind: Any) -> str:
    """How the values of a type look in a recipe; a choice lists its words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(inner)
    if origin is tuple:
        return f"[{kind_as_written(inner[0])}, ...]"
    if origin is dict:
        return f"{{name: {kind_as_written(inner[1])}, ...}}"
    if inner:
        return " | ".join(map(kind_as_written, inner))
    return {type(None): "null", Any: "value"}.get(kind) or str(kind.__name__)


def field_helps(schema: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    helps = {}
    for kind in filter(is_dataclass, reversed(schema.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field_node, text_node in pairwise(body):
            if isinstance(field_node, ast.AnnAssign) and isinstance(text_node, ast.Expr):
                helps[field_node.target.id] = ast.literal_eval(text_node.value)  # type: ignore[union-attr]
    return helps


def members(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def parts_of(kind: Any) -> tuple[Any, ...]:
    """The dataclasses among the members of a type."""
    return tuple(member for member in members(kind) if is_dataclass(member))


def named_part(kind: Any) -> Any:
    """The dataclass whose values a mapping holds by name, or None."""
    arguments = typing.get_args(kind) if typing.get_origin(kind) is dict else ()
    return arguments[1] if len(arguments) == 2 and is_dataclass(arguments[1]) else None


def is_choice(kind: Any) -> bool:
    """Whether a setting may be of several types, none of which is a part."""
    return len({*members(kind)} - {type(None)}) > 1 and not parts_of(kind)


def parts_below(schema: type[Any]) -> list[type[Any]]:
    """A part, and every part that it may hold, at any depth; none twice."""
    found = [schema]
    for kind in found:
        for hint in typing.get_type_hints(kind).values():
            held = (*parts_of(hint), named_part(hint))
            found += [other for other in held if other is not None and other not in found]
    return found


def names_below(part: Any, name: str) -> list[str]:
    """The settings of the parts that a field may hold."""
    kinds = parts_of(typing.get_type_hints(part)[name])
    return [item.name for kind in kinds for item in fields(kind)]


def tags_of(parts: Sequence[Any]) -> dict[Any, str]:
    """The `suite` tag of each member of a union of parts."""
    return {kind: typing.get_args(typing.get_type_hints(kind)["suite"])[0] for kind in parts}
