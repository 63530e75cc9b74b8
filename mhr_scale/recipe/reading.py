"""Reading a recipe: strict YAML, `a.b=c` overrides, and errors that say where and what to do.

Precedence: a field's default < the recipe < the command line. YAML is read by the 1.2 core schema
(`1e-3` is a number, `no` is a string), repeated keys are refused, and every error names file and
line.
"""

import ast
import inspect
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from mhr_scale.errors import ConfigError, describe_fault, did_you_mean, some
from mhr_scale.recipe import strict_yaml
from mhr_scale.recipe.part import VERBS

T = TypeVar("T")

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
    if not names:
        return "; give the path of a recipe, such as launch/recipes/toy.yaml"
    return did_you_mean(path.name, names) or f"; recipes in {folder}: {some(names)}"


def load(schema: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Read a recipe file into `schema`; raises `ConfigError` with file, line and way out."""
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
    _check_tags(schema, tree)
    _check_finite(tree, tree.values, ())
    try:
        return TypeAdapter(schema).validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as error:
        raise _first_fault(schema, tree, error) from error


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


def help_page(schema: type[T], argv: Sequence[str], *, about: str) -> str | None:
    """What `--help` asks for: how to call a command, and every setting; None without it."""
    options, _ = split_words(argv, "--print")
    if "--help" not in options:
        return None
    return (
        f"{about.strip()}\n\n--print shows the complete recipe, and stops. The settings of a "
        f"recipe:\n\n{help_text(schema)}"
    )


def parse(schema: type[T], argv: Sequence[str], *, about: str) -> Command[T]:
    """Parse `RECIPE [a.b=c ...] [--print]`.

    `about` is the help text of the command; its first line with RECIPE is the usage.
    """
    options, words = split_words(argv, "--print")
    call = next(line for line in about.splitlines() if "RECIPE" in line)
    check_recipe_given(words, usage=call.partition("  ")[0])
    config = load(schema, words[0], words[1:])
    return Command(config=config, print_only="--print" in options)


def to_yaml(config: Any) -> str:
    """A config as a complete recipe that loads to the same values."""
    return strict_yaml.write(json.loads(json.dumps(asdict(config))))


def help_text(schema: type[Any], prefix: str = "") -> str:
    """Every setting with its type, default and help line."""
    lines = []
    hints = typing.get_type_hints(schema)
    helps = _field_helps(schema)
    for item in fields(schema):
        named = _named_part(hints[item.name])
        if named is not None:
            lines.append(help_text(named, f"{prefix}{item.name}.NAME."))
            continue
        kinds = _parts(hints[item.name])
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
        kind = _kind_as_written(hints[item.name])
        lines.append(f"{prefix}{item.name}: {kind} ({default})\n    {text}\n")
    return "".join(lines)


def settings_of(schema: type[Any], prefix: str = "") -> frozenset[str]:
    """The dotted names of all settings of a recipe, but for those of parts with a name."""
    names: set[str] = set()
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        kinds = _parts(hints[item.name])
        for kind in kinds:
            names |= settings_of(kind, f"{prefix}{item.name}.")
        if not kinds:
            names.add(f"{prefix}{item.name}")
    return frozenset(names)


def as_written(value: Any) -> str:
    """A value as a recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def _kind_as_written(kind: Any) -> str:
    """How the values of a type look in a recipe; a choice lists its words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(inner)
    if origin is tuple:
        return f"[{_kind_as_written(inner[0])}, ...]"
    if origin is dict:
        return f"{{name: {_kind_as_written(inner[1])}, ...}}"
    if inner:
        return " | ".join(map(_kind_as_written, inner))
    return {type(None): "null", Any: "value"}.get(kind) or str(kind.__name__)


def _members(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _field_helps(schema: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    helps = {}
    for kind in filter(is_dataclass, reversed(schema.__mro__)):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field_node, text_node in pairwise(body):
            if isinstance(field_node, ast.AnnAssign) and isinstance(text_node, ast.Expr):
                helps[field_node.target.id] = ast.literal_eval(text_node.value)  # type: ignore[union-attr]
    return helps


def _first_fault(schema: type[Any], tree: _Tree, error: ValidationError) -> ConfigError:
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
        inner = [f"{item}.{path[-1]}" for item in known if path[-1] in _names_below(part, item)]
        if inner and not hint:
            hint = f"; did you mean '{'.'.join((*path[:-1], inner[0]))}'?"
        listed = f"; known here: {', '.join(known)}" if known else ""
        return ConfigError(f"{place}: unknown setting '{name}'{hint or listed}")
    if fault["type"].startswith("missing"):
        return ConfigError(f"{place}: setting '{name}' is required")
    if fault["type"] == "value_error":
        return ConfigError(f"{place}: {fault['ctx']['error']}")
    if _is_choice(kind := typing.get_type_hints(part).get(path[-1])):
        given = as_written(reduce(dict.__getitem__, path, tree.values))
        return ConfigError(f"{place}: {name}: {given} is not {_kind_as_written(kind)}")
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        expected = fault["ctx"]["expected"]
        hint = did_you_mean(fault["input"], re.findall(r"'([^']+)'", expected))
        return ConfigError(f"{place}: {name}: '{fault['input']}' is not {expected}{hint}")
    return ConfigError(f"{place}: {describe_fault(fault, path)}")


def _parts(kind: Any) -> tuple[Any, ...]:
    """The dataclasses among the members of a type."""
    return tuple(member for member in _members(kind) if is_dataclass(member))


def _is_choice(kind: Any) -> bool:
    """Whether a setting may be of several types, none of which is a part."""
    return len({*_members(kind)} - {type(None)}) > 1 and not _parts(kind)


def _names_below(part: Any, name: str) -> list[str]:
    """The settings of the parts that a field may hold."""
    kinds = _parts(typing.get_type_hints(part)[name])
    return [item.name for kind in kinds for item in fields(kind)]


def _named_part(kind: Any) -> Any:
    """The dataclass whose values a mapping holds by name, or None."""
    arguments = typing.get_args(kind) if typing.get_origin(kind) is dict else ()
    return arguments[1] if len(arguments) == 2 and is_dataclass(arguments[1]) else None


def _tags(parts: Sequence[Any]) -> dict[Any, str]:
    """The `suite` tag of each member of a union of parts."""
    return {kind: typing.get_args(typing.get_type_hints(kind)["suite"])[0] for kind in parts}


def _check_tags(schema: type[Any], tree: _Tree) -> None:
    """Raise `ConfigError` if the tag that chooses a member of a union is missing or unknown."""
    for name, hint in typing.get_type_hints(schema).items():
        if len(_parts(hint)) < 2 or name not in tree.values:
            continue
        known = list(_tags(_parts(hint)).values())
        values = tree.values[name]
        if values is None and type(None) in _members(hint):
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
            if _tags(parts)[parts[0]] != values.get("suite"):
                return [], None
            continue
        path.append(step)
        if parts:
            holder = parts[0]
            hint = typing.get_type_hints(holder).get(step)
            parts, named = _parts(hint), _named_part(hint)
            if _is_choice(hint):
                break
        values = values.get(step) if isinstance(values, dict) else None
    return path, holder
