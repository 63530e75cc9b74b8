"""Raw rows of the data sets of T0, rendered by promptsource's templates: P3 made on the way.

Rows are those of the training split, in the schema of their data set. They come from the hub or
from a local folder, where a data set lies in one of three ways:

    <dataset>[/<subset>]/train.jsonl                      a row a line
    <dataset>[/<subset>]/train-00000-of-00001.parquet     the hub's own, one or more shards
    <dataset>[/<subset>]/dataset_info.json                what `save_to_disk` writes of a `Dataset`,
    <dataset>[/<subset>]/train/dataset_info.json          and of a `DatasetDict`

A row that a template says nothing about is dropped and counted (`empty_render: drop`, as in P3), or
trained on as `<NO INPUT>` and `<NO LABEL>` (`placeholder`, as in T-Few). `<NO LABEL>` is no answer
choice, so that such an example has no choices. A row that a template fails on, because it lacks a
field for example, is refused, as is a target that is not among the choices. Every prompt reads its
data set anew: nothing but the examples of one task lies in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mhr_scale.errors import DataError, first_line
from mhr_scale.run.runlog import log
from mhr_scale.tasks.json_lines import JsonLine, iter_rows
from mhr_scale.tasks.t0.bounds import UnboundedTemplateError
from mhr_scale.tasks.t0.held_out_rows import read_saved
from mhr_scale.tasks.t0.p3 import all_shards
from mhr_scale.tasks.t0.prompts import FILE, NO_LABEL, Prompter, Rendered, Template, load_templates
from mhr_scale.tasks.tabular import iter_parquet, number_rows
from mhr_scale.tasks.task import Example, Intake, IntakeConfig, Place

SPLIT = "train"
HUB = "hub"
LOOKED_FOR = (
    "<dataset>[/<subset>]/train.jsonl, <dataset>[/<subset>]/train-*.parquet and a folder of "
    "save_to_disk at <dataset>[/<subset>]"
)

Reader = Callable[[str, Intake], Iterator[JsonLine]]
"""Reads the rows of a data set; takes the name under which bad lines are refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSource:
    """Where raw rows are, by `<dataset>[/<subset>]`, and the templates of prompts by P3's name."""

    name: str
    rows: Mapping[str, Reader]
    templates: Mapping[str, Template]
    prompter: Prompter


def open_source(
    name: str, wanted: Mapping[str, str], *, templates: Path, prompter: Prompter
) -> RawSource:
    """Find the templates of the wanted prompts, and the rows of their data sets as far as there.

    `name` is `HUB` or a folder of raw rows, `templates` the folder of templates. `wanted` has the
    `<dataset>[/<subset>]` of every prompt. Raises `DataError` naming every prompt without a
    template.
    """
    by_prompt = _find_templates(templates, wanted)
    folder = Path(name).expanduser()
    if name != HUB and not folder.is_dir():
        raise DataError(
            f"tasks.source: no folder '{name}' (looked in {Path.cwd()}); with "
            f"tasks.templates give a folder of raw rows or '{HUB}'"
        )
    find = _find_on_hub if name == HUB else partial(_find_in_folder, folder)
    readers = {data_set: find(data_set) for data_set in sorted(set(wanted.values()))}
    return RawSource(
        name=name,
        rows={data_set: reader for data_set, reader in readers.items() if reader},
        templates=by_prompt,
        prompter=prompter,
    )


def read_examples(
    source: RawSource,
    config: str,
    *,
    max_rows: int | None = None,
    with_template: bool = False,
    policy: IntakeConfig,
    intake: Intake,
) -> list[Example]:
    """Read the examples of one prompt, in the order of the rows; unusable rows go to `intake`.

    `config` is the prompt's name in P3. `max_rows` counts the first raw rows, whatever becomes of
    them. An example's id is the number of its row, from 1, `with_template` also the template's
    name (`7/classify`). Raises `DataError` for rows that cannot be read, and for a prompt without
    a usable row.
    """
    template = source.templates[config]
    refused, dropped, number = len(intake.rejects), 0, 0
    examples = []
    lines = source.rows[template.source](config, intake)
    for number, line in enumerate(islice(_readable(lines, template.source), max_rows), start=1):
        id = f"{number}/{template.name}" if with_template else str(number)
        try:
            rendered = source.prompter.render(template, line.row, row_id=str(number))
            if rendered is None:
                dropped += 1
                continue
            example = _make_example(rendered, id=id, place=line.place, policy=policy)
        except UnboundedTemplateError:
            raise
        except ValueError as error:
            intake.refuse(place=line.place, task=config, reason=str(error), text=line.text)
        else:
            examples.append(replace(example, prompt=template.name if with_template else ""))
            intake.take()
    if not examples:
        bad = intake.rejects[refused:]
        why = f", first {bad[0].place}: {bad[0].reason}" if bad else ""
        raise DataError(
            f"{source.name}: no usable row for {config} in {template.source} ({number} rows read, "
            f"{dropped} render empty{why}); mend the rows, read more or leave the prompt out"
        )
    if dropped:
        log.info("%s: %d of %d rows render empty, dropped", config, dropped, number)
    return examples


def _find_templates(folder: Path, wanted: Mapping[str, str]) -> dict[str, Template]:
    if not folder.is_dir():
        raise DataError(f"tasks.templates: no folder '{folder}' (looked in {Path.cwd()})")
    by_prompt: dict[str, Template] = {}
    for data_set in sorted(set(wanted.values())):
        if (folder / data_set / FILE).is_file():
            templates = load_templates(folder, *_split(data_set))
            by_prompt.update((template.config_name, template) for template in templates)
    missing = sorted(wanted.keys() - by_prompt.keys())
    if missing:
        raise DataError(
            f"tasks.templates: {folder} lacks {len(missing)} of {len(wanted)} prompts: "
            f"{', '.join(missing)}; add their templates or name the other prompts in tasks.tasks"
        )
    return {name: by_prompt[name] for name in wanted}


def _split(data_set: str) -> tuple[str, str | None]:
    dataset, _, subset = data_set.partition("/")
    return dataset, subset or None


def _find_on_hub(data_set: str) -> Reader | None:
    """Open a data set of the hub by its name, without a row downloaded yet."""
    from datasets import load_dataset

    dataset, subset = _split(data_set)
    try:
        rows: Any = load_dataset(dataset, subset, split=SPLIT, streaming=True)
    except Exception as error:  # whatever the network, the hub or the data set's files cause
        reason = f"{type(error).__name__}: {first_line(error)}"
        log.warning("%s: the hub does not give its split '%s' (%s)", data_set, SPLIT, reason)
        return None
    return lambda _task, _intake: number_rows(rows, source=f"{data_set}/{SPLIT}")


def _find_in_folder(folder: Path, data_set: str) -> Reader | None:
    home = folder / data_set
    readers: dict[str, Reader] = {}
    jsonl = home / f"{SPLIT}.jsonl"
    if jsonl.is_file():
        readers[jsonl.name] = lambda task, intake: iter_rows(jsonl, task=task, intake=intake)
    shards = [path.name for path in home.glob(f"{SPLIT}-*.parquet")]
    if shards:
        paths = [home / name for name in all_shards(shards, where=str(home))]
        readers[f"{SPLIT}-*.parquet"] = lambda _task, _intake: _read_parquet(paths)
    for saved in (home, home / SPLIT):
        if (saved / "dataset_info.json").is_file():
            readers[f"{saved.name}/dataset_info.json"] = partial(_read_saved, saved)
    if len(readers) > 1:
        raise DataError(f"{home}: the same rows in {' and '.join(readers)}; keep one of them")
    return next(iter(readers.values()), None)


def _read_saved(folder: Path, _task: str, _intake: Intake) -> Iterator[JsonLine]:
    return read_saved(folder)


def _read_parquet(paths: list[Path]) -> Iterator[JsonLine]:
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: the shard is missing; fetch it, or read fewer rows")
        yield from iter_parquet(path)


def _readable(lines: Iterator[JsonLine], data_set: str) -> Iterator[JsonLine]:
    """Say of which data set the rows are that cannot be read any further."""
    try:
        yield from lines
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file or the network causes
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{data_set}: cannot be read ({reason}); fetch it anew") from error


def _make_example(rendered: Rendered, *, id: str, place: Place, policy: IntakeConfig) -> Example:
    """Make an example of a rendered row; the `ValueError` it raises says why it is of no use."""
    text, target, choices = rendered.input, rendered.target, rendered.choices
    if problem := policy.find_empty(text, ()):
        raise ValueError(problem)
    if not choices or target == NO_LABEL:
        return Example(id=id, input=text, targets=(target,), place=place)
    if len(choices) < 2:
        raise ValueError("fewer than two choices")
    if target not in choices:
        shown = target if len(target) <= 40 else target[:40] + "..."
        raise ValueError(f"target {shown!r} is not among the choices")
    label = choices.index(target)
    return Example(id=id, input=text, targets=(target,), choices=choices, label=label, place=place)
