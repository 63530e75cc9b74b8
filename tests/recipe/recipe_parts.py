"""A good recipe, and the parts that recipes are made of."""

import dataclasses
import typing

from mhr_scale import config

PARTS = [
    kind
    for kind in vars(config).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
]


def parts_in(kind):
    """The parts among the types of a part's fields, by field."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        members = (hint, *typing.get_args(hint))
        yield field.name, [member for member in members if dataclasses.is_dataclass(member)]


INNER = {id(part) for kind in PARTS for _, parts in parts_in(kind) for part in parts}
#: What a launched verb reads: the parts that are no part of another.
VERBS = [kind for kind in PARTS if id(kind) not in INNER]

GOOD = """\
backbone: {name: "builtin:toy"}
adapter: {rank: 2}
tasks: {suite: toy}
schedule: {steps: 10}
run:
  folder: runs/x
"""
