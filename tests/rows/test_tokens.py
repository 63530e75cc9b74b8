"""Tokenised once: the same rows from memory and from the cache, and no cache that is not whole."""

import json
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.config import BatchConfig, JsonlTasks
from mhr_scale.errors import DataError
from mhr_scale.families.t5 import GATED
from mhr_scale.rows import tokens
from mhr_scale.rows.tokens import TokenSet, open_tokens

BYTES = ByT5Tokenizer()
WORDS = AutoTokenizer.from_pretrained(BUILTIN["builtin:toy"])
TASKS = {"copy": 23, "sort": 40, "swap": 11}


def write_source(folder: Path, *, bad: int = 0) -> Path:
    for task, n_rows in TASKS.items():
        (folder / task).mkdir(parents=True)
        rows = [
            json.dumps(
                {"input": f"{task} {n}", "target": "a" * (n % 7 + 1), "targets": ["a", "bc"]}
            )
            for n in range(n_rows)
        ]
        (folder / task / "train.jsonl").write_text("\n".join([*rows, *["{"] * bad]) + "\n")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def read(
    source: Path,
    cache: Path | None = None,
    *,
    tokenizer: Any = BYTES,
    family: Any = GATED,
    **batch: Any,
) -> TokenSet:
    config = JsonlTasks(suite="jsonl", folder=str(source), validation_examples=3)
    folder = None if cache is None else str(cache)
    return open_tokens(config, tokenizer, BatchConfig(**batch), family, cache=folder)


def values(made: TokenSet) -> list[Any]:
    return [
        [
            [(row.input_ids.tolist(), [t.tolist() for t in row.answers]) for row in rows]
            for rows in fold
        ]
        for fold in (made.train, made.validation)
    ]


def only_folder(cache: Path) -> Path:
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    return folder


def test_the_cache_gives_the_rows_that_memory_gives(source: Path, tmp_path: Path) -> None:
    assert values(read(source, tmp_path / "cache")) == values(read(source))


def test_a_second_start_gives_the_same_rows(source: Path, tmp_path: Path) -> None:
    assert values(read(source, tmp_path / "cache")) == values(read(source, tmp_path / "cache"))


def test_a_second_start_does_not_tokenise(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(source, tmp_path / "cache")
    monkeypatch.setattr(tokens, "_tokenise", None)
    assert len(read(source, tmp_path / "cache").cards) == len(TASKS)


def test_cards_come_back_as_they_were(source: Path, tmp_path: Path) -> None:
    read(source, tmp_path / "cache")
    assert read(source, tmp_path / "cache").cards == read(source).cards


def test_rows_of_many_record_batches_are_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = values(read(source))
    monkeypatch.setattr(tokens, "BATCH_ROWS", 7)
    assert values(read(source, tmp_path / "cache")) == whole


def test_a_row_beyond_the_last_is_an_index_error(source: Path) -> None:
    rows = read(source).train[0]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_ids_of_a_small_vocabulary_take_two_bytes(source: Path, tmp_path: Path) -> None:
    row = read(source, tmp_path / "cache").train[0][0]
    assert (row.input_ids.dtype, row.answers[0].dtype) == (np.uint16, np.uint16)


def test_rows_are_views_into_the_mapped_file(source: Path, tmp_path: Path) -> None:
    row = read(source, tmp_path / "cache").train[0][0]
    assert not row.input_ids.flags.owndata
    assert not row.input_ids.flags.writeable


@pytest.mark.parametrize(
    "batch",
    [{"max_input_tokens": 8}, {"max_target_tokens": 4}, {"too_long": "drop"}],
    ids=["input_length", "target_length", "policy"],
)
def test_other_lengths_make_another_cache(
    source: Path, tmp_path: Path, batch: dict[str, Any]
) -> None:
    read(source, tmp_path / "cache")
    assert values(read(source, tmp_path / "cache", **batch)) == values(read(source, **batch))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_another_tokenizer_makes_another_cache(source: Path, tmp_path: Path) -> None:
    read(source, tmp_path / "cache")
    made = read(source, tmp_path / "cache", tokenizer=WORDS)
    assert values(made) == values(read(source, tokenizer=WORDS))


@pytest.mark.parametrize("changed", ["cut_side", "close"])
def test_a_family_that_cuts_or_closes_otherwise_makes_another_cache(
    source: Path, tmp_path: Path, changed: str
) -> None:
    other = {"cut_side": "left", "close": lambda ids, side, tokenizer: [*ids, 2]}
    own = {"cut_side": GATED.cut_side, "close": GATED.close}
    family = SimpleNamespace(**{**own, changed: other[changed]})
    for one in (GATED, family):
        made = read(source, tmp_path / "cache", family=one, max_input_tokens=6)
        assert values(made) == values(read(source, family=one, max_input_tokens=6))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_a_changed_source_makes_another_cache(source: Path, tmp_path: Path) -> None:
    read(source, tmp_path / "cache")
    file = source / "copy" / "train.jsonl"
    file.write_text(file.read_text().replace("copy 0", "copy!0"))
    assert values(read(source, tmp_path / "cache")) == values(read(source))


def test_an_interrupted_build_leaves_no_cache_and_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, done, inner = tmp_path / "cache", [], tokens._tokenise

    def interrupted(task: Any, *rest: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.name)
        return inner(task, *rest)

    monkeypatch.setattr(tokens, "_tokenise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(source, cache)
    assert only_folder(cache).name.endswith(".tmp")
    done.clear()
    made = read(source, cache)
    assert done == ["swap"]
    monkeypatch.undo()
    assert values(made) == values(read(source))


def _open(source: Path, cache: Path, found: Any) -> None:
    found.put(values(read(source, cache)))


def test_processes_that_start_together_make_one_cache(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    processes = [
        context.Process(target=_open, args=(source, tmp_path / "cache", found)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    results = [found.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert results == [values(read(source))] * 3
    assert not only_folder(tmp_path / "cache").name.startswith(".")


def damage_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"too_long": "cut"', '"too_long": "drop"'))


def truncate_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def truncate_tokens(folder: Path) -> None:
    file = folder / "00001.train.arrow"
    file.write_bytes(file.read_bytes()[:100])


def remove_tokens(folder: Path) -> None:
    (folder / "00002.validation.arrow").unlink()


def swap_tokens(folder: Path) -> None:
    shutil.copy(folder / "00000.train.arrow", folder / "00001.train.arrow")


@pytest.mark.parametrize(
    "harm", [damage_manifest, truncate_manifest, truncate_tokens, remove_tokens, swap_tokens]
)
def test_a_cache_that_is_not_what_it_says_is_refused_with_the_way_out(
    source: Path, tmp_path: Path, harm: Any
) -> None:
    read(source, tmp_path / "cache")
    folder = only_folder(tmp_path / "cache")
    harm(folder)
    with pytest.raises(DataError, match=f"delete {folder} to have it made anew"):
        read(source, tmp_path / "cache")


def test_refused_rows_come_back_from_the_cache(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", bad=1)
    first, second = (read(source, tmp_path / "cache").rejects for _ in range(2))
    assert [reject["task"] for reject in first] == ["copy", "sort", "swap"]
    assert first == second


def test_a_refused_text_may_hold_any_line_separator(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    with (tmp_path / "source" / "copy" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"input": "a\u2028b\u0085c\\u000bd", "traget": 3}\n')
    for _ in range(2):
        made = read(tmp_path / "source", tmp_path / "cache")
        (reject,) = made.rejects
        assert "a\u2028b\u0085c" in reject["text"]


def test_too_many_refused_rows_leave_no_cache(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", bad=9)
    with pytest.raises(DataError, match="rows refused"):
        read(source, tmp_path / "cache")
    assert not any(path.name[0] != "." for path in (tmp_path / "cache").iterdir())
