"""Tokens without a cache: made once a machine, mapped by all ranks, and gone with the launch."""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_tokens import TASKS, read, values, write_source

from mhr_scale.errors import DataError
from mhr_scale.rows import tokens
from mhr_scale.rows.machine_folder import machine_folder

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three tasks, seen by a launch of two ranks with a temporary folder of its own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name, value in {"LOCAL_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    return write_source(tmp_path / "source")


def left(source: Path) -> list[str]:
    """Names of what is in the temporary folder, this user's empty one apart."""
    found = (source.parent / "temporary").rglob("*")
    return sorted(path.name for path in found if not path.name.startswith("mhr_scale-"))


class Rank:
    """A process that opens the tokens, says what it has read, and lives until `end`."""

    def __init__(self, source: Path, number: int, *, port: int = 29500, dies: bool = False) -> None:
        self.pipe, its_pipe = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=self._run, args=(its_pipe, source, number, port, dies), daemon=True
        )
        self.process.start()

    @staticmethod
    def _run(pipe: Any, source: Path, number: int, port: int, dies: bool) -> None:
        os.environ |= {"RANK": str(number), "MASTER_PORT": str(port)}
        inner, made = tokens._tokenise, []

        def tokenise(task: Any, *rest: Any) -> Any:
            if dies and made:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(task.name)
            return inner(task, *rest)

        tokens._tokenise = tokenise
        opened = read(source)
        pipe.send(made)
        pipe.recv()
        row = opened.train[0][0]
        pipe.send((values(opened), row.input_ids.flags.owndata))
        pipe.recv()

    def made(self) -> list[str]:
        """Which tasks it has tokenised."""
        assert self.pipe.poll(60)
        found: list[str] = self.pipe.recv()
        return found

    def rows(self) -> Any:
        """What it reads now, and whether its rows are its own memory."""
        self.pipe.send(None)
        return self.pipe.recv()

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.join()


def test_one_rank_tokenises_for_all_of_its_machine_and_no_file_is_left(source: Path) -> None:
    ranks = [Rank(source, number) for number in range(2)]
    assert sorted(len(rank.made()) for rank in ranks) == [0, len(TASKS)]
    assert left(source) == []
    for rank in ranks:
        assert rank.rows() == (values(read(source)), False)
        rank.end()


def test_a_late_rank_finds_the_files_whatever_other_launches_do(source: Path) -> None:
    first = Rank(source, 0)
    assert first.made() == list(TASKS)
    others = [Rank(source, number, port=29501) for number in range(2)]
    assert sum(len(rank.made()) for rank in others) == len(TASKS)
    late = Rank(source, 1)
    assert late.made() == []
    assert left(source) == []
    for rank in (first, late, *others):
        rank.end()


def test_what_killed_launches_left_goes_with_the_next_launch(source: Path) -> None:
    dying = Rank(source, 0, dies=True)
    dying.process.join()
    assert any(name.endswith(".tmp") for name in left(source))
    without_the_other = Rank(source, 0, port=29501)
    without_the_other.made()
    without_the_other.end()
    assert "manifest.json" in left(source)
    assert not any(name.endswith(".tmp") for name in left(source))
    ranks = [Rank(source, number, port=29502) for number in range(2)]
    assert sum(len(rank.made()) for rank in ranks) == len(TASKS)
    assert left(source) == []
    for rank in ranks:
        rank.end()


def test_a_killed_launch_leaves_nothing_that_the_same_one_would_take_for_its_own(
    source: Path,
) -> None:
    killed = Rank(source, 0)
    killed.made()
    killed.end()
    again = Rank(source, 0)
    assert again.made() == list(TASKS)
    again.end()


@pytest.mark.parametrize("harm", ["full", "missing", "of others"])
def test_ranks_that_cannot_share_keep_their_own(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "tokens.arrow")

    if harm == "full":
        monkeypatch.setattr(tokens, "_write", full)
    elif harm == "missing":
        monkeypatch.setattr(tempfile, "tempdir", str(source / "nowhere"))
    else:
        monkeypatch.setenv("LOCAL_SIZE", "1")
        with machine_folder("a name") as folder:
            folder.parent.chmod(0o777)
        monkeypatch.setenv("LOCAL_SIZE", "2")
    opened = read(source)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    assert values(opened) == values(read(source))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "run.token_cache, or TMPDIR" in record.getMessage()
    assert left(source) == []


def test_refused_data_leaves_no_file(source: Path) -> None:
    with (source / "copy" / "train.jsonl").open("a") as file:
        file.write("{\n" * 20)
    with pytest.raises(DataError, match="rows refused"):
        read(source)
    assert left(source) == []
