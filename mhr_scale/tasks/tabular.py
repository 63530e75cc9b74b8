"""Rows of tables (CSV, TSV, Parquet), given out as the rows of JSON lines are.

The first line of a CSV or TSV file names the columns, and a row is known by its first line; a row
of Parquet by its number, from 1. Cells are text, so that what is no text stands in them as JSON:
`["yes", "no"]`, `1`.
"""

import csv
import json
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from mhr_scale.errors import DataError, first_line, some
from mhr_scale.tasks.json_lines import JsonLine, iter_rows, parse
from mhr_scale.tasks.task import Intake, Place

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
#: Endings of the files that `iter_file` reads.
ENDINGS = (".jsonl", *DELIMITERS, PARQUET)
BATCH_ROWS = 1000


def iter_file(
    path: Path, *, task: str, intake: Intake, structured: Collection[str], texts: Collection[str]
) -> Iterator[JsonLine]:
    """Yield the rows of a file by its ending; refuse those that are none under the name `task`.

    In CSV and TSV the columns `structured` hold JSON, and an empty cell counts as absent in all
    columns but `texts`.
    """
    ending = path.suffix.lower()
    if ending == PARQUET:
        yield from iter_parquet(path)
    elif ending not in DELIMITERS:
        yield from iter_rows(path, task=task, intake=intake)
    else:
        for line in iter_csv(path, task=task, intake=intake):
            try:
                row = _from_cells(line.row, structured=structured, texts=texts)
            except ValueError as error:
                intake.refuse(place=line.place, task=task, reason=str(error), text=line.text)
            else:
                yield JsonLine(place=line.place, text=line.text, row=row)


def iter_csv(path: Path, *, task: str, intake: Intake) -> Iterator[JsonLine]:
    """Yield the rows of a CSV or TSV file, cells as text; refuse those with too few or too many.

    Raises `DataError` for a header or for quotes that make no sense.
    """
    csv.field_size_limit(sys.maxsize)
    line, columns = 1, None
    try:
        with path.open("rb") as raw:
            texts = (text.decode("utf-8", errors="surrogateescape") for text in raw)
            reader = csv.reader(texts, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
            for cells in reader:
                place, line = Place(file=str(path), line=line), reader.line_num + 1
                if columns is None:
                    columns = _columns(cells, place)
                elif cells:
                    problem = _cell_problem(cells, columns)
                    if problem is None:
                        row = dict(zip(columns, cells, strict=True))
                        yield JsonLine(place=place, text=",".join(cells), row=row)
                    else:
                        intake.refuse(place=place, task=task, reason=problem, text=",".join(cells))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: the row that begins here is not {path.suffix[1:].upper()} ({error}); "
            'mend its quotes ("" is a quote inside quotes)'
        ) from error


def _columns(cells: list[str], place: Place) -> list[str]:
    columns = [cell.removeprefix("\ufeff").strip() for cell in cells]
    if not "".join(columns).isprintable():
        raise DataError(f"{place}: a header of {', '.join(map(ascii, columns))}; save it as UTF-8")
    if len(columns) == 1:
        raise DataError(
            f"{place}: a header of one column, {columns[0]!a}; separate cells by commas in .csv, "
            "by tabs in .tsv"
        )
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{place}: column {twice!a} stands twice; rename one")
    return columns


def _cell_problem(cells: list[str], columns: list[str]) -> str | None:
    if len(cells) != len(columns):
        return f"{len(cells)} cells, expected the {len(columns)} of the header ({some(columns)})"
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return "bad UTF-8"
    return None


def _from_cells(
    cells: dict[str, str], *, structured: Collection[str], texts: Collection[str]
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, cell in cells.items():
        if name in texts or (cell and name not in structured):
            row[name] = cell
        elif cell:
            try:
                row[name] = parse(cell)
            except ValueError as error:
                raise ValueError(f"'{name}' is to hold JSON: {error}") from None
    return row


def iter_parquet(path: Path) -> Iterator[JsonLine]:
    """Yield the rows of a Parquet file; raises `DataError` if it cannot be read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            batches = table.iter_batches(BATCH_ROWS)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from number_rows(rows, source=str(path))
    except (OSError, ValueError, ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); fetch it anew") from error


def number_rows(rows: Iterable[dict[str, Any]], *, source: str) -> Iterator[JsonLine]:
    """Yield the rows of a table with their places, from 1 on."""
    for number, row in enumerate(rows, start=1):
        text = json.dumps(row, ensure_ascii=False, default=str)
        yield JsonLine(place=Place(file=source, line=number), text=text, row=row)
