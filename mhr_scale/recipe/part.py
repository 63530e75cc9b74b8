"""The decorator of every part of a recipe."""

from dataclasses import dataclass, field
from typing import TypeVar

from typing_extensions import dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def part(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that refuses unknown fields when a recipe is read."""
    decorated = dataclass(frozen=True, kw_only=True, slots=True)(cls)
    decorated.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return decorated
