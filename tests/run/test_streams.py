"""Results on standard output, all else on standard error, whoever reads them."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from mhr_scale.errors import ExitCode
from mhr_scale.run import streams
from mhr_scale.run.runlog import Progress, log, start_logging
from mhr_scale.verbs import launching

HOSTILE = "task \x1b[31mred\x1b[0m \x07\r of \u202ecba"
ESCAPED = "task \\x1b[31mred\\x1b[0m \\x07\\r of \\u202ecba"


class Broken(io.StringIO):
    """A stream that nobody can write to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.refused = number, 0

    def write(self, text: str) -> int:
        self.refused += 1
        raise OSError(self.number, os.strerror(self.number))


def outcome(action) -> int:
    with streams.opened():
        return launching._outcome(action)


def test_results_go_to_one_stream_and_what_libraries_print_to_the_other(capsys) -> None:
    def action() -> None:
        print("from a library")
        streams.write_result("the table\n")

    assert outcome(action) == ExitCode.DONE
    assert capsys.readouterr() == ("the table\n", "from a library\n")


@pytest.mark.parametrize("stream", [None, Broken(errno.EPIPE), Broken(errno.EBADF)])
def test_a_result_without_a_reader_ends_quietly_once_all_is_done(
    stream, monkeypatch, capsys
) -> None:
    done = []

    def action() -> None:
        streams.write_result("the table\n")
        done.append("saved")

    monkeypatch.setattr(sys, "stdout", stream)
    assert (outcome(action), done) == (ExitCode.UNREAD, ["saved"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert outcome(lambda: streams.write_result("x")) == ExitCode.DONE


def test_a_result_that_a_full_disk_swallows_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    start_logging()
    assert outcome(lambda: streams.write_result("x")) == ExitCode.MISTAKE
    assert capsys.readouterr().err.startswith("error: standard output: the disk is full; ")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_run_goes_on_though_nobody_reads_its_log(number, monkeypatch) -> None:
    stream = Broken(number)
    monkeypatch.setattr(sys, "stderr", stream)
    start_logging()
    log.warning("nobody reads this")
    assert stream.refused


def test_what_a_terminal_would_obey_is_escaped_in_lines_results_and_bars(capsys) -> None:
    start_logging()
    log.info("%s\n\tand more", HOSTILE)
    streams.write_result(HOSTILE + "\n")
    assert capsys.readouterr() == (ESCAPED + "\n", ESCAPED + "\n\tand more\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_stands_alone_and_the_bar_comes_again_below(monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_logging()
    progress = Progress(3, start=0, what="train")
    progress.advance(HOSTILE)
    log.info("saved steps/1")
    progress.close()
    screen = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
    assert "saved steps/1" in screen
    assert "train" in terminal.getvalue().partition("saved steps/1\n")[2]
    assert "\x1b[31m" not in terminal.getvalue()


# -- launches ------------------------------------------------------------------------------------


def launch(
    redirection: str, *words: str, limit: str = "", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    command = f'{limit}"$0" launch/pretrain.py "$@" {redirection}'
    return subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        timeout=120,
        check=False,
    )


RECIPE = "launch/recipes/toy.yaml"


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 141), (">/dev/full", 2), (">&- 2>&- <&-", 141)]
)
def test_a_launch_whose_output_is_closed_or_full_says_at_most_one_line(
    redirection: str, code: int
) -> None:
    result = launch(redirection, RECIPE, "--print")
    assert result.returncode == code
    assert len(result.stderr.splitlines()) == (code == 2)


def test_names_that_an_encoding_lacks_are_escaped_and_the_run_ends_well(tmp_path: Path) -> None:
    """On stdout the result alone, and what the run leaves under its own name."""
    folder = tmp_path / "n\u00e4me"
    settings = ("schedule.steps=1", "tasks.n_tasks=2", "tasks.train_examples=4", "run.save_every=0")
    small = ("batch.batch_size=4", "batch.micro_batch_size=4", "tasks.validation_examples=2")
    words = (RECIPE, *settings, *small, "mixture.group=1", f"run.folder={folder}")
    result = launch("", *words, PYTHONIOENCODING="ascii", PATH="/nonexistent")
    assert result.returncode == 0, result.stderr
    assert f"  adapter  {tmp_path}/n\\xe4me/adapter".encode() in result.stdout
    assert b"validation loss" in result.stderr
    assert b"validation loss" not in result.stdout
    (start,) = json.loads((folder / "provenance.json").read_text())
    assert start["git_commit"] == "unknown"  # no git on this PATH


def test_a_process_without_room_for_the_libraries_says_so_in_one_line() -> None:
    result = launch("", RECIPE, limit="ulimit -v 300000; ")
    (line,) = result.stderr.decode().splitlines()
    assert result.returncode == 2
    assert "under a limit of 0.31 GB (ulimit -v)" in line
