"""Reading a recipe: strict YAML, `a.b=c` overrides, and errors that say where and what to do.

Precedence: a field's default < the recipe < the command line. YAML is read by the 1.2 core schema
(`1e-3` is a number, `no` is a string), repeated keys are refused, and every error names file and
line.
"""

import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mhr_scale.errors import ConfigError, describe_fault, did_you_mean, some
from mhr_scale.recipe import shipped, strict_yaml
from mhr_scale.recipe.part import VERBS
from mhr_scale.recipe.schema import schema_text
from mhr_scale.recipe.settings import (
    as_written,
    help_text,
    is_choice,
    kind_as_written,
    members,
    named_part,
    names_below,
    parts_of,
    tags_of,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

#: The options of a command that reads a recipe, beside `--help`.
OPTIONS = ("--print", "--schema")
#: Pydantic's error types for a key that a part does not have.
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command(Generic[T]):
    """A parsed command line."""

    config: T
    print_only: bool


class _Tree:
    """Plain values of a YAML document and the `file:line` of every key."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.places: dict[tuple[str, ...], str] = {}

    def read(self, text: str) -> None:
        """Parse YAML text; raises `ConfigError` with file and line."""
        self.values, self.places = strict_yaml.read(text, source=self.source, error=ConfigError)

    def override(self, argument: str) -> None:
        """Apply one `a.b=c`; the value is read as YAML."""
        key, equals, text = argument.partition("=")
        path = tuple(key.split("."))
        place = "'" + argument.replace("\n", "\\n") + "'"
        if not equals or not all(path):
            raise ConfigError(f"{place}: overrides read a.b=value")
        value = _Tree(place)
        value.read(f"value: {text}" if "\n" not in text else f"value: {json.dumps(text)}")
        branch = self.values
        for name in path[:-1]:
            if not isinstance(branch.get(name), dict):
                branch[name] = {}
            branch = branch[name]
        branch[path[-1]] = value.values["value"]
        self.places = {other: p for other, p in self.places.items() if other[: len(path)] != path}
        for depth in range(1, len(path) + 1):
            self.places[path[:depth]] = place

    def place(self, path: Sequence[str]) -> str:
        """The place of the nearest existing key on `path`."""
        for depth in range(len(path), 0, -1):
            if tuple(path[:depth]) in self.places:
                return self.places[tuple(path[:depth])]
        return self.source


def _read_file(path: Path) -> _Tree:
    path = shipped.find(str(path), shipped.RECIPES, ".yaml") or path
    tree = _Tree(str(path))
    try:
        tree.values, tree.places = strict_yaml.read_file(path, error=ConfigError)
    except ConfigError as error:
        if path.is_file():
            raise
        raise ConfigError(f"{error}{_recipes_near(path)}") from error
    return tree


def _recipes_near(path: Path) -> str:
    """What a recipe that is no file may have been meant to be."""
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for file in folder.glob("*.yaml")) if folder.is_dir() else []
    hint = did_you_mean(path.name, names)
    hint = hint or did_you_mean(path.stem, shipped.names(shipped.RECIPES, ".yaml"))
    here = f"recipes in {folder}: {some(names)}; " if names else ""
    return hint or f"; {here}give the path of a recipe, or a name that `mhr_scale recipes` lists"


def load(schema: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Read a recipe file into `schema`; raises `ConfigError` with file, line and way out.

    Where no file is of that path, a shipped recipe may be of that name.
    """
    tree = _read_file(Path(path))
    for argument in overrides:
        tree.override(argument)
    return _build(schema, tree)


def overrides_of(name: str, settings: Mapping[str, Any] | None) -> list[str]:
    """Settings of the part `name` as the overrides that `load` takes."""
    return [f"{name}.{key}={json.dumps(value)}" for key, value in (settings or {}).items()]


def load_settings(schema: type[T], overrides: Sequence[str]) -> T:
    """Read settings from the command line alone; raises `ConfigError`."""
    tree = _Tree("command line")
    for argument in overrides:
        tree.override(argument)
    return _build(schema, tree)


def read_names(path: Path | str) -> list[str]:
    """The top-level keys of a recipe file; raises `ConfigError` if it cannot be read."""
    return list(_read_file(Path(path)).values)


def _build(schema: type[T], tree: _Tree) -> T:
    """Validate a tree; of a recipe of another verb the verb is named instead of a setting."""
    try:
        return _validate(schema, tree)
    except ConfigError:
        verbs = [verb for verb, other in VERBS.items() if _is_valid(other, tree)]
        if verbs and schema in VERBS.values():
            own = next(verb for verb, other in VERBS.items() if other is schema)
            raise ConfigError(
                f"{tree.source}: a recipe of {' or '.join(verbs)}, not of {own}"
            ) from None
        raise


def _is_valid(schema: type[Any], tree: _Tree) -> bool:
    try:
        _validate(schema, tree)
    except ConfigError:
        return False
    return True


def _validate(schema: type[T], tree: _Tree) -> T:
    """Validate a tree against a dataclass, strictly (JSON's types, nothing coerced)."""
    from pydantic import ValidationError

    _check_tags(schema, tree)
    _check_finite(tree, tree.values, ())
    try:
        found: T = _adapter(typing.cast(Any, schema)).validate_json(
            json.dumps(tree.values), strict=True
        )
    except ValidationError as error:
        raise _first_fault(schema, tree, error) from error
    return found


@cache
def _adapter(schema: Any) -> "TypeAdapter[Any]":
    """What validates a schema; made once, which takes longer than to use it."""
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def split_words(argv: Sequence[str], *options: str) -> tuple[set[str], list[str]]:
    """The options of a command line (`-h` as `--help`), and its other arguments.

    The launcher's `--local_rank=N` is dropped: ranks come from the environment. Raises
    `ConfigError` for an option that is neither `--help` nor one of `options`.
    """
    words = [word for word in argv if not word.startswith("--local_rank")]
    chosen = {"--help" if word == "-h" else word for word in words if word.startswith("-")}
    unknown = chosen - {*options, "--help"}
    if unknown and "--help" not in chosen:
        known = ", ".join([*options, "--help"])
        raise ConfigError(f"unknown option {min(unknown)}; options: {known}")
    return chosen, [word for word in words if not word.startswith("-")]


def check_recipe_given(words: Sequence[str], *, usage: str) -> None:
    """Raise `ConfigError` unless the first argument can be a recipe."""
    if not words or ("=" in words[0] and not Path(words[0]).exists()):
        raise ConfigError(f"no recipe given; usage: {usage}")


def page_of(schema: type[T], argv: Sequence[str], *, about: str) -> str | None:
    """What `--help` asks for, how to call a command and every setting, or `--schema`; else None."""
    options, _ = split_words(argv, *OPTIONS)
    if "--help" in options:
        return (
            f"{about.strip()}\n\n--print shows the complete recipe, --schema the JSON schema by "
            f"which editors complete one. The settings of a recipe:\n\n{help_text(schema)}"
        )
    return schema_text(schema) if "--schema" in options else None


def parse(schema: type[T], argv: Sequence[str], *, about: str) -> Command[T]:
    """Parse `RECIPE [a.b=c ...] [--print]`.

    `about` is the help text of the command; its first line with RECIPE is the usage.
    """
    options, words = split_words(argv, *OPTIONS)
    call = next(line for line in about.splitlines() if "RECIPE" in line)
    check_recipe_given(words, usage=call.partition("  ")[0])
    config = load(schema, words[0], words[1:])
    return Command(config=config, print_only="--print" in options)


def to_yaml(config: Any) -> str:
    """A config as a complete recipe that loads to the same values."""
    return strict_yaml.write(json.loads(json.dumps(asdict(config))))


def _first_fault(schema: type[Any], tree: _Tree, error: "ValidationError") -> ConfigError:
    """The first error as one line; of a union of parts only the member chosen by its tag counts."""
    found = error.errors(include_url=False)
    places = [_resolve(schema, tree.values, [str(step) for step in one["loc"]]) for one in found]
    faults = [(*at, fault) for at, fault in zip(places, found, strict=True) if at[0]]
    # a misspelt setting comes before a missing one, which it explains
    faults.sort(key=lambda entry: entry[2]["type"] not in UNKNOWN)
    path, part, fault = faults[0] if faults else ([], schema, error.errors()[0])
    name, place = ".".join(path), tree.place(path)
    known = [item.name for item in fields(part)] if is_dataclass(part) else []
    if fault["type"] in UNKNOWN:
        hint = did_you_mean(path[-1], known)
        inner = [f"{item}.{path[-1]}" for item in known if path[-1] in names_below(part, item)]
        if inner and not hint:
            hint = f"; did you mean '{'.'.join((*path[:-1], inner[0]))}'?"
        listed = f"; known here: {', '.join(known)}" if known else ""
        return ConfigError(f"{place}: unknown setting '{name}'{hint or listed}")
    if fault["type"].startswith("missing"):
        return ConfigError(f"{place}: setting '{name}' is required")
    if fault["type"] == "value_error":
        return ConfigError(f"{place}: {fault['ctx']['error']}")
    if is_choice(kind := typing.get_type_hints(part).get(path[-1])):
        given = as_written(reduce(dict.__getitem__, path, tree.values))
        return ConfigError(f"{place}: {name}: {given} is not {kind_as_written(kind)}")
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        expected = fault["ctx"]["expected"]
        hint = did_you_mean(fault["input"], re.findall(r"'([^']+)'", expected))
        return ConfigError(f"{place}: {name}: '{fault['input']}' is not {expected}{hint}")
    return ConfigError(f"{place}: {describe_fault(fault, path)}")


def _check_tags(schema: type[Any], tree: _Tree) -> None:
    """Raise `ConfigError` if the tag that chooses a member of a union is missing or unknown."""
    for name, hint in typing.get_type_hints(schema).items():
        if len(parts_of(hint)) < 2 or name not in tree.values:
            continue
        known = list(tags_of(parts_of(hint)).values())
        values = tree.values[name]
        if values is None and type(None) in members(hint):
            continue
        tag = values.get("suite") if isinstance(values, dict) else None
        place, listed = tree.place((name, "suite")), ", ".join(known)
        if tag is None:
            raise ConfigError(f"{place}: setting '{name}.suite' is required; one of {listed}")
        if tag not in known:
            hint_text = did_you_mean(str(tag), known)
            raise ConfigError(f"{place}: {name}.suite: '{tag}' is not one of {listed}{hint_text}")


def _check_finite(tree: _Tree, values: Any, path: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a number that is NaN or infinite, or a string with a zero byte."""
    is_infinite = isinstance(values, float) and not math.isfinite(values)
    if is_infinite or (isinstance(values, str) and "\0" in values):
        raise ConfigError(f"{tree.place(path)}: {'.'.join(path)}: {values} is no setting")
    if isinstance(values, dict | list):
        for key, inner in values.items() if isinstance(values, dict) else enumerate(values):
            _check_finite(tree, inner, (*path, str(key)))


def _resolve(schema: Any, values: Any, steps: list[str]) -> tuple[list[str], Any]:
    """Turn pydantic's location into a recipe path and the part that holds its last name.

    Steps that name a member of a union are left out; the path is empty for one not chosen by tag.
    """
    path: list[str] = []
    parts: tuple[Any, ...] = (schema,)
    holder = schema
    named: Any = None
    for step in steps:
        if named is not None:  # the step is a part's name in a mapping
            path.append(step)
            values = values.get(step) if isinstance(values, dict) else None
            parts, holder, named = (named,), named, None
            continue
        if len(parts) > 1:
            parts = tuple(part for part in parts if part.__name__ == step)
            if tags_of(parts)[parts[0]] != values.get("suite"):
                return [], None
            continue
        path.append(step)
        if parts:
            holder = parts[0]
            hint = typing.get_type_hints(holder).get(step)
            parts, named = parts_of(hint), named_part(hint)
            if is_choice(hint):
                break
        values = values.get(step) if isinstance(values, dict) else None
    return path, holder
