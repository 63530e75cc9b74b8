"""P3, the prompted text of T0: a config per prompt, its rows rendered already.

`open_source` takes the hub id of P3, or a local folder in one of three layouts:

    <config>/<split>-00000-of-00001.parquet    the hub's own
    <config>/dataset_dict.json                 what `DatasetDict.save_to_disk` writes
    <config>/<split>.jsonl                     a row a line, the columns being its keys

Texts are taken from `inputs_pretokenized` and `targets_pretokenized` and stripped. The token ids
beside them are never read: their inputs lack the end of the sequence. `answer_choices`, where there
are any, become the choices, and the target must be one of them. A config called `*_score_eval` has
a row per choice: its rows are put together by `idx`, a pair of the example's and the choice's
number, and exactly one of them must be `is_correct`. Configs of ANLI carry the round in their name
(`anli_GPT_3_style_r1`) and have the splits of the others.

What is read: of a table the columns above and no other, in batches, as far as `max_rows` says. A
shard behind that is neither opened nor downloaded and may be absent. A `*_score_eval` config is
read whole, since the rows of an example need not stand together.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mhr_scale.errors import DataError, first_line, shortened
from mhr_scale.run.runlog import log
from mhr_scale.tasks.json_lines import iter_rows, kind_of
from mhr_scale.tasks.task import Example, Intake, IntakeConfig, Place

if TYPE_CHECKING:
    import pyarrow

INPUT, TARGET, CHOICES = "inputs_pretokenized", "targets_pretokenized", "answer_choices"
INDEX, IS_CORRECT = "idx", "is_correct"
KINDS = {
    INPUT: "text",
    TARGET: "text",
    CHOICES: "list of text",
    INDEX: "list of integers",
    IS_CORRECT: "boolean",
}
RANKED = "_score_eval"
LAYOUTS = {
    "parquet": re.compile(r"([^/.][^/]*)/([^/.-]+)-[^/]*\.parquet"),
    "saved": re.compile(r"([^/.][^/]*)/()dataset_dict\.json"),
    "jsonl": re.compile(r"([^/.][^/]*)/([^/.-]+)\.jsonl"),
}
LOOKED_FOR = (
    "<config>/<split>-00000-of-00001.parquet, <config>/dataset_dict.json (save_to_disk) "
    "and <config>/<split>.jsonl"
)
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.parquet")
BATCH_ROWS = 1000
HUB_TIMEOUT_SECONDS = 30.0

Row = dict[str, Any]  # Any: whatever the file holds
Splits = dict[str, dict[str, list[str]]]  # config -> split -> files below the source


class Entry(NamedTuple):
    """A row as it stands in a file."""

    place: Place
    row: Row


@dataclass(frozen=True, kw_only=True, slots=True)
class P3Source:
    """Where P3 is: its configs, their splits and the files of those, and how to get a file."""

    name: str
    layout: str
    splits: Splits
    fetch: Callable[[str], Path]


def open_source(name: str, *, setting: str = "source") -> P3Source:
    """Find out what is in a local folder or, if there is none, under a hub id.

    `setting` is what errors call the name. Without the hub, what it gave before is used.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _open_folder(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or ":" in name:
        raise DataError(
            f"{setting}: no folder '{name}' (looked in {Path.cwd()}); give a folder or a hub id "
            "such as bigscience/P3"
        )
    return _open_hub(name, setting)


def read_examples(
    source: P3Source,
    config: str,
    *,
    split: str,
    max_rows: int | None = None,
    policy: IntakeConfig,
    intake: Intake,
) -> list[Example]:
    """Read the examples of one config, in their order; unusable rows go to `intake`.

    `max_rows` counts the first rows, usable or not; of a `*_score_eval` config, examples. Raises
    `DataError` for a file that cannot be read, a wrong column, or a config without a usable row.
    """
    refused = len(intake.rejects)
    entries = _iter_entries(source, config, split, intake)
    units: Iterable[tuple[int, list[Entry]]]
    if config.endswith(RANKED):
        units, make = _group(entries, config, intake).items(), _ranked_example
    else:
        units, make = ((number, [entry]) for number, entry in enumerate(entries, 1)), _plain_example
    examples = []
    for number, members in islice(units, max_rows):
        try:
            example = make(members, id=f"{config}/{split}:{number}", policy=policy)
        except ValueError as error:
            _refuse(members[0], str(error), config, intake)
        else:
            examples.append(example)
            intake.take()
    if not examples:
        bad = intake.rejects[refused:]
        why = f" ({bad[0].place}: {bad[0].reason})" if bad else ""
        raise DataError(
            f"{source.name}: no usable row in {config}, split {split}{why}; mend or remove it"
        )
    return examples


def _open_folder(folder: Path) -> P3Source:
    files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()]
    return _make_source(str(folder), sorted(files), fetch=lambda file: folder / file)


def _open_hub(name: str, setting: str) -> P3Source:
    """List a data set of the hub; its files are downloaded one by one when they are read."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"]))
    except Exception as error:
        raise DataError(
            f"{setting}: '{name}' is no local folder and the hub does not give it "
            f"({type(error).__name__}: {first_line(error)}); give a folder or a hub id such as "
            "bigscience/P3"
        ) from error
    revision = folder.name
    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:
        log.warning("%s: no hub (%s); reading %s", name, type(error).__name__, folder)
        return _open_folder(folder)

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
        except Exception as error:
            raise DataError(
                f"{name}/{file}: the hub does not give it ({type(error).__name__}: "
                f"{first_line(error)}); start again, what is there stays"
            ) from error

    shards = [f.rfilename for f in info.siblings or () if f.rfilename.endswith(".parquet")]
    return _make_source(name, shards, fetch=fetch)


def _make_source(name: str, files: list[str], *, fetch: Callable[[str], Path]) -> P3Source:
    """Sort files by layout, config and split; exactly one layout must be there."""
    by_layout: dict[str, Splits] = {}
    for file in files:
        for layout, pattern in LAYOUTS.items():
            match = pattern.fullmatch(file)
            if match:
                configs = by_layout.setdefault(layout, {})
                configs.setdefault(match[1], {}).setdefault(match[2], []).append(file)
    if not by_layout:
        raise DataError(f"{name}: nothing of P3 here; looked for {LOOKED_FOR}")
    if len(by_layout) > 1:
        kinds = ", ".join(sorted(by_layout))
        raise DataError(f"{name}: layouts side by side ({kinds}); keep one of {LOOKED_FOR}")
    ((layout, splits),) = by_layout.items()
    if layout == "parquet":
        for config, files_of in splits.items():
            for split, shards in files_of.items():
                files_of[split] = all_shards(shards, where=f"{name}/{config}")
    elif layout == "saved":
        splits = {config: _saved_splits(fetch(files[""][0])) for config, files in splits.items()}
    return P3Source(name=name, layout=layout, splits=splits, fetch=fetch)


def all_shards(shards: list[str], *, where: str) -> list[str]:
    """Name all shards of a split in their order, those that are absent included."""
    matches = [match for match in map(SHARD.fullmatch, shards) if match]
    if not matches:
        return sorted(shards)
    count = matches[0][2]
    if len(matches) < len(shards) or any(match[2] != count for match in matches):
        raise DataError(f"{where}: shards of several sets ({', '.join(sorted(shards))}); keep one")
    return [f"{matches[0][1]}-{number:05}-of-{count}.parquet" for number in range(int(count))]


def _saved_splits(path: Path) -> dict[str, list[str]]:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        return {split: [f"{path.parent.name}/{split}"] for split in splits}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no list of splits ({first_line(error)}); save it anew") from error


def _iter_entries(source: P3Source, config: str, split: str, intake: Intake) -> Iterator[Entry]:
    """Yield the rows of a split, file by file and lazily, with the wanted columns alone."""
    for file in source.splits[config][split]:
        path, where = source.fetch(file), f"{source.name}/{file}"
        if source.layout == "jsonl":
            for line in iter_rows(path, task=config, intake=intake):
                yield Entry(line.place, line.row)
            continue
        batches = _parquet_batches if source.layout == "parquet" else _saved_batches
        number = 0
        try:
            for rows in batches(path, config, where):
                for row in rows:
                    number += 1
                    yield Entry(Place(file=where, line=number), row)
        except DataError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{where}: cannot be read ({reason}); fetch it anew") from error


def _parquet_batches(path: Path, config: str, where: str) -> Iterator[list[Row]]:
    from pyarrow.parquet import ParquetFile

    if not path.is_file():
        raise DataError(f"{where}: the shard is missing; fetch it, or read fewer rows")
    with ParquetFile(path) as table:
        columns = _columns(table.schema_arrow, config, where)
        for batch in table.iter_batches(BATCH_ROWS, columns=columns):
            yield batch.to_pylist()


def _saved_batches(path: Path, config: str, where: str) -> Iterator[list[Row]]:
    from datasets import load_from_disk

    table = load_from_disk(str(path))
    columns = _columns(table.features.arrow_schema, config, where)
    for batch in table.select_columns(columns).with_format("arrow").iter(BATCH_ROWS):
        yield batch.to_pylist()


def _columns(schema: "pyarrow.Schema", config: str, where: str) -> list[str]:
    """Name the columns to read; raises `DataError` if one is missing or of another type."""
    expected = [INPUT, TARGET, *((INDEX, IS_CORRECT) if config.endswith(RANKED) else ())]
    kinds = {field.name: _kind(field.type) for field in schema}
    missing = [column for column in expected if column not in kinds]
    if missing:
        raise DataError(
            f"{where}: config {config} lacks {', '.join(missing)}; expected the columns "
            f"{', '.join(expected)}, found {', '.join(kinds) or 'none'}"
        )
    if not config.endswith(RANKED) and kinds.get(CHOICES, "").removeprefix("list of ") != "nulls":
        expected += [CHOICES] if CHOICES in kinds else []
    for column in expected:
        if kinds[column] != KINDS[column]:
            raise DataError(
                f"{where}: config {config}: column {column} is {kinds[column]}, expected "
                f"{KINDS[column]}"
            )
    return expected


def _kind(type_: "pyarrow.DataType") -> str:
    """Say in a word what a column of a type holds."""
    from pyarrow import types

    if types.is_string(type_) or types.is_large_string(type_):
        return "text"
    if types.is_boolean(type_):
        return "boolean"
    if types.is_integer(type_):
        return "integers"
    if types.is_null(type_):
        return "nulls"
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return f"list of {_kind(type_.value_type)}"
    return str(type_)


def _plain_example(members: list[Entry], *, id: str, policy: IntakeConfig) -> Example:
    """Make an example of a row; the `ValueError` it raises says why it cannot be used."""
    ((place, row),) = members
    text, target = _text(row, INPUT), _text(row, TARGET)
    _check_not_empty(text, [target], policy)
    choices, label = _choices(row), None
    if choices:
        if target not in choices:
            raise ValueError(f"target {shortened(target)} is not among the choices")
        label = choices.index(target)
    return Example(id=id, input=text, targets=(target,), choices=choices, label=label, place=place)


def _ranked_example(members: list[Entry], *, id: str, policy: IntakeConfig) -> Example:
    """Make an example of the rows of its choices, in the order of these."""
    numbers = [entry.row[INDEX][1] for entry in members]
    if numbers != list(range(len(numbers))) or len(numbers) < 2:
        raise ValueError(f"choices {numbers}; expected two or more from 0 on, each once")
    texts = [_text(entry.row, INPUT) for entry in members]
    if len(set(texts)) > 1:
        raise ValueError("its choices have different inputs")
    choices = tuple(_text(entry.row, TARGET) for entry in members)
    _check_not_empty(texts[0], choices, policy)
    marks = [entry.row.get(IS_CORRECT) for entry in members]
    if not all(isinstance(mark, bool) for mark in marks):
        raise ValueError(f"'{IS_CORRECT}' is missing or not a boolean")
    if marks.count(True) != 1:
        raise ValueError(f"{marks.count(True)} of {len(marks)} choices are correct, expected one")
    label = marks.index(True)
    return Example(
        id=id,
        input=texts[0],
        targets=(choices[label],),
        choices=choices,
        label=label,
        place=members[0].place,
    )


def _group(entries: Iterable[Entry], config: str, intake: Intake) -> dict[int, list[Entry]]:
    """Bring together the rows of each example, in the order of its choices."""
    groups: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        index = entry.row.get(INDEX)
        if isinstance(index, list) and [type(number) for number in index] == [int, int]:
            groups[index[0]].append(entry)
        else:
            _refuse(entry, f"'{INDEX}' is {index!r}, expected [example, choice]", config, intake)
    for group in groups.values():
        group.sort(key=lambda entry: entry.row[INDEX][1])
    return groups


def _refuse(entry: Entry, reason: str, config: str, intake: Intake) -> None:
    text = json.dumps(entry.row, ensure_ascii=False)
    intake.refuse(place=entry.place, task=config, reason=reason, text=text)


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise ValueError(f"missing field '{column}'")
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is {kind_of(value)}, expected a string")
    return value.strip()


def _choices(row: Row) -> tuple[str, ...]:
    choices = row.get(CHOICES)
    if choices is None or choices == []:
        return ()
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"'{CHOICES}' is not a list of strings")
    if len(choices) < 2:
        raise ValueError("fewer than two choices")
    return tuple(choice.strip() for choice in choices)


def _check_not_empty(text: str, targets: Iterable[str], policy: IntakeConfig) -> None:
    if problem := policy.find_empty(text, targets):
        raise ValueError(problem)
