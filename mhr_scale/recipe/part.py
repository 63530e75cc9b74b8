"""The decorators of every part of a recipe, and of a whole one."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from typing_extensions import dataclass_transform

T = TypeVar("T")

#: The recipes by the verbs that read them, as far as they are imported.
VERBS: dict[str, type[Any]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def part(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that refuses unknown fields when a recipe is read."""
    decorated = dataclass(frozen=True, kw_only=True, slots=True)(cls)
    decorated.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return decorated


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def recipe(cls: type[T]) -> type[T]:
    """The part that is a verb's whole recipe, as `EvaluateConfig` is that of `evaluate`."""
    decorated = part(cls)
    VERBS[cls.__name__.removesuffix("Config").lower()] = decorated
    return decorated
