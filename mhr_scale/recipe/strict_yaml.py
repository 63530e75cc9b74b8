"""Strict YAML: scalars of YAML 1.2, no repeated keys, and the line of every key.

`1e-3` is a number, `010` is ten, `no` and `12:30` are strings, and only plain values are built.
"""

import re
from collections.abc import Callable
from pathlib import Path as File
from typing import Any, ClassVar

import yaml

from mhr_scale.errors import UserError

Path = tuple[str, ...]

#: Longest file that is read, in bytes; what is longer is not what it was taken for.
MOST_BYTES = 2**20
#: Limit of values in a document: aliases of aliases expand a few lines to billions.
MOST_VALUES = 200_000

TAG = "tag:yaml.org,2002:"
SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)
CONVERT: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower())),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with the scalar rules of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which also quotes strings that YAML 1.2 would read as numbers."""


for _tag, _pattern, _first in SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{TAG}{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def write(values: Any) -> str:
    """Plain values as YAML text that `read`, and readers of YAML 1.1, read as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False)


def read_file(file: File, *, error: type[UserError]) -> tuple[dict[str, Any], dict[Path, str]]:
    """Read the YAML mapping of a file as `read` does; raises `error` if it cannot be read."""
    try:
        with file.open("rb") as opened:
            raw = opened.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise error(f"{file}: longer than {MOST_BYTES} bytes, the most that is read")
        return read(raw.decode("utf-8"), source=str(file), error=error)
    except OSError as fault:
        raise error(f"{file}: cannot be read ({fault.strerror})") from fault
    except UnicodeDecodeError as fault:
        raise error(f"{file}: not UTF-8 text ({fault.reason})") from fault


def read(
    text: str, *, source: str, error: type[UserError]
) -> tuple[dict[str, Any], dict[Path, str]]:
    """Read a YAML mapping: its plain values, and `source:line` of every key by path.

    Raises `error` with the place for bad syntax, a key that is repeated or not a string, a value
    that is not plain or contains itself, or a document that is not a mapping. An empty document is
    an empty mapping.
    """
    builder = _Builder(source, error)
    try:
        node = _Loader(text).get_single_node()
        values = builder.build(node, ()) if node else None
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = mark.line + 1 if mark else 1
        raise error(f"{source}:{line}: not YAML: {fault.problem}") from fault
    except yaml.reader.ReaderError as fault:
        line = text.count("\n", 0, fault.position) + 1
        raise error(f"{source}:{line}: not YAML: {fault.reason}") from fault
    except RecursionError as fault:
        raise error(f"{source}: not YAML: nested too deeply") from fault
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise error(f"{source}: expected a mapping, got {type(values).__name__}")
    return values, builder.places


class _Builder:
    """Builds plain values from nodes and records the place of every key."""

    def __init__(self, source: str, error: type[UserError]) -> None:
        self.places: dict[Path, str] = {}
        self._source, self._error = source, error
        self._open: list[yaml.Node] = []
        self._n_values = 0

    def build(self, node: yaml.Node, path: Path) -> Any:
        """Return the value of the node at `path`."""
        place = self._place(node)
        self._n_values += 1
        if self._n_values > MOST_VALUES:
            raise self._error(f"{place}: more than {MOST_VALUES} values; are they aliases?")
        self.places.setdefault(path, place)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        if node.tag not in (f"{TAG}map", f"{TAG}seq"):
            raise self._error(f"{place}: not YAML: {node.tag} is no plain value")
        if any(node is outer for outer in self._open):
            raise self._error(f"{place}: not YAML: '{'.'.join(path)}' refers to what it is part of")
        self._open.append(node)
        is_mapping = isinstance(node, yaml.MappingNode)
        values = self._mapping(node, path) if is_mapping else self._list(node, path)
        self._open.pop()
        return values

    def _list(self, node: yaml.Node, path: Path) -> list[Any]:
        return [self.build(item, (*path, str(number))) for number, item in enumerate(node.value)]

    def _mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = key_node.value, self._place(key_node)
            if not isinstance(key, str):
                raise self._error(f"{place}: a key must be a word")
            self._check_word(key, place)
            if key in built:
                name, first = ".".join((*path, key)), self.places[(*path, key)]
                raise self._error(f"{place}: key '{name}' stands twice (first {first})")
            self.places[(*path, key)] = place
            built[key] = self.build(value_node, (*path, key))
        return built

    def _scalar(self, node: yaml.ScalarNode, place: str) -> Any:
        kind, text = node.tag.removeprefix(TAG), node.value
        if kind == "str":
            self._check_word(text, place)
            return text
        if not any(kind == name and re.fullmatch(pattern, text) for name, pattern, _ in SCALARS):
            raise self._error(f"{place}: not YAML: '{text}' is no plain value of type {kind}")
        try:
            return CONVERT[kind](text)
        except ValueError as fault:
            raise self._error(f"{place}: {fault}") from fault

    def _check_word(self, text: str, place: str) -> None:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self._error(f"{place}: not YAML: half a character (\\ud800 to \\udfff)")

    def _place(self, node: yaml.Node) -> str:
        return f"{self._source}:{node.start_mark.line + 1}"
