"""How a checkpoint holds the tensors of a model: transformers' own mapping of names, read lazily.

Checkpoints call tensors otherwise than modules do, leave the model's prefix out, or hold experts
apart. transformers knows this as lists of renamings and conversions; here they are asked which
stored tensors a parameter is made of, and no tensor is touched.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mhr_scale.errors import BackboneError


class Stored(NamedTuple):
    """The tensors of a checkpoint whose numbers, one after the other, are those of a parameter.

    They are joined along its first dimension; with `stacked` they are so many groups in a stack.
    """

    names: tuple[str, ...]
    stacked: int | None = None


class Arrangement(NamedTuple):
    """What parameters are made of that a checkpoint does not hold by their own names.

    `unused` are names of its tensors that the model has no use for; `is_part` if it is the
    checkpoint of a greater model; `is_usual` if it is the one by which other programs know the
    model, and files that are written keep it.
    """

    stored: dict[str, Stored]
    unused: frozenset[str] = frozenset()
    is_part: bool = False
    is_usual: bool = False


#: That of a checkpoint that holds every parameter by its own name.
AS_NAMED = Arrangement({})
#: Conversions that lay tensors side by side, by their operations and dimensions: whether what
#: they make is a stack.
JOINED: dict[tuple[tuple[str, int | None], ...], bool] = {
    (("MergeModulelist", 0),): True,
    (("MergeModulelist", 0), ("Concatenate", 1)): True,
    (("Concatenate", 0),): False,
}


def map_names(model: Any, names: Iterable[str]) -> dict[str, Stored]:
    """What each tensor of `model` is made of, as transformers loads it; unknown ones of themselves.

    Raises `BackboneError` for a conversion that is more than laying tensors side by side.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known:
            target, pattern = name, None
        found.setdefault(target, {}).setdefault(pattern, []).append(name)
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    stored = {}
    for target, parts in found.items():
        pattern = next(iter(parts))
        if None in parts or pattern is None:
            stored[target] = _whole(target, parts)
        else:
            stored[target] = _joined(target, by_pattern[pattern], parts)
    return stored


def _whole(target: str, parts: Mapping[Any, Sequence[str]]) -> Stored:
    names = tuple(name for listed in parts.values() for name in listed)
    if len(names) > 1:
        raise BackboneError(
            f"the checkpoint holds {target} more than once, as {' and '.join(names[:2])}; keep one"
        )
    return Stored(names)


def _joined(target: str, converter: Any, parts: Mapping[Any, Sequence[str]]) -> Stored:
    """The order in which a conversion lays tensors side by side."""
    steps = tuple((type(one).__name__, getattr(one, "dim", None)) for one in converter.operations)
    lists = [parts.get(pattern, ()) for pattern in converter.source_patterns]
    if steps not in JOINED or len(converter.target_patterns) > 1:
        raise BackboneError(
            f"the checkpoint holds {target} as {next(iter(parts.values()))[0]}, converted by "
            f"{', '.join(map(str, converter.operations))}, which is not done here; load it in "
            "transformers and save it with save_original_format=False"
        )
    if len({len(listed) for listed in lists}) > 1:
        counts = zip(map(len, lists), converter.source_patterns, strict=True)
        raise BackboneError(
            f"the checkpoint holds only some parts of {target}: "
            f"{', '.join(f'{count} of {pattern}' for count, pattern in counts)}; fetch it again"
        )
    if JOINED[steps]:
        names = tuple(name for group in zip(*lists, strict=True) for name in group)
        return Stored(names, len(lists[0]))
    return Stored(tuple(name for listed in lists for name in listed))
