"""YAML without surprises: 1.2 scalar rules, no key twice, and the line of every key.

`1e-3` is a number, `no` and `12:30` are words, and nothing but plain values is built.
"""

import re
from typing import Any, ClassVar

import yaml

from mhr_scale.errors import UserError

Path = tuple[str, ...]

SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner with the scalar rules of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def read(
    text: str, *, source: str, error: type[UserError]
) -> tuple[dict[str, Any], dict[Path, str]]:
    """Read a YAML mapping: its plain values, and `source:line` of every key by path.

    Raises `error` with the place for bad syntax, a key that stands twice or is no word, or a
    document that is no mapping. An empty document is an empty mapping.
    """
    places: dict[Path, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = _build(loader, node, (), source, places, error) if node else {}
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = mark.line + 1 if mark else 1
        raise error(f"{source}:{line}: not YAML: {fault.problem}") from fault
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise error(f"{source}: not YAML: {fault}") from fault
    if not isinstance(values, dict):
        raise error(f"{source}: expected a mapping, got {type(values).__name__}")
    return values, places


def _build(
    loader: _Loader,
    node: yaml.Node,
    path: Path,
    source: str,
    places: dict[Path, str],
    error: type[UserError],
) -> Any:
    places.setdefault(path, f"{source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(loader, item, (*path, str(number)), source, places, error)
            for number, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, place = key_node.value, f"{source}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise error(f"{place}: a key must be a word")
        name = ".".join((*path, key))
        if key in built:
            raise error(f"{place}: key '{name}' stands twice (first {places[(*path, key)]})")
        places[(*path, key)] = place
        built[key] = _build(loader, value_node, (*path, key), source, places, error)
    return built
