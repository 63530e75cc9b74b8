"""What disks, memory and other ranks do to a run, in one line; and the exit codes."""

import errno
import re
from collections.abc import Callable

import pytest
import torch
from safetensors import SafetensorError

from mhr_scale.config import ExportConfig, PretrainConfig
from mhr_scale.errors import ExitCode, RunError
from mhr_scale.recipe.part import VERBS
from mhr_scale.recipe.settings import settings_of
from mhr_scale.run import failures, stopping
from mhr_scale.run.runlog import start_logging
from mhr_scale.verbs import launching

GLOO = "[/w/gloo/transport/tcp/"
CASES = [
    (OSError(errno.ENOSPC, "No space left", "runs/x/steps"), "runs/x/steps: the disk is full", 2),
    (OSError(errno.EDQUOT, "Quota", "runs/x"), "the quota of the disk is used up", 2),
    (OSError(errno.EROFS, "Read-only", "runs/x"), "runs/x: the disk is read-only", 2),
    (PermissionError(errno.EACCES, "denied", "runs/x"), "runs/x: no permission", 2),
    (FileNotFoundError(errno.ENOENT, "no", "data/t.jsonl"), "data/t.jsonl: is not there", 2),
    (OSError(errno.EIO, "I/O", "runs/x"), "runs/x: the disk failed", 2),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full", 2),
    (MemoryError(), "memory is used up", 2),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory is used up", 2),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory is used up", 2),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory is used up", 2),
    (
        RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"),
        "raise run.timeout_seconds",
        2,
    ),
    (RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [::1]"), "another rank", 69),
    (RuntimeError(f"{GLOO}pair.cc:537] Read error: Connection reset by peer"), "another rank", 69),
    (
        RuntimeError("put_ does not have a deterministic implementation, but you set"),
        "run.deterministic: torch has no deterministic form of put_ on this device",
        2,
    ),
    (
        RuntimeError("Deterministic behavior was enabled with either, because it uses CuBLAS"),
        "no deterministic form of a product",
        2,
    ),
    (RuntimeError("can't start new thread"), "memory or threads are limited too narrowly", 2),
    (ImportError("libx.so: failed to map segment from shared object"), "raise that limit", 2),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "(or ulimit -u)", 2),
    (RunError("train.jsonl:7: mend it"), "train.jsonl:7: mend it", 2),
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "batch.workers", 2),
]


@pytest.mark.parametrize(("error", "words", "code"), CASES, ids=[str(c[0])[:40] for c in CASES])
def test_what_happens_to_a_run_is_one_line_with_a_way_out(
    error: Exception, words: str, code: int
) -> None:
    explained = failures.explain(error)
    assert explained is not None
    assert words in explained.text
    assert "\n" not in explained.text
    assert explained.code == code


@pytest.mark.parametrize("schema", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")], ids=repr)
def test_a_verb_is_only_told_settings_that_it_has(error: Exception, schema: type) -> None:
    explained = failures.explain(error, settings_of(schema))
    assert explained is not None
    named = set(re.findall(r"\b(?:batch|waves|scoring|backbone|run)\.[a-z_]+", explained.text))
    assert named <= settings_of(schema)


def test_what_takes_less_memory_is_said_where_the_verb_can_do_it() -> None:
    known = settings_of(PretrainConfig)
    text = failures.explain(MemoryError(), known).text
    assert "lower batch.micro_batch_size or batch.max_input_tokens, or set backbone.rec" in text
    assert "by run.ds_config, or close other programs" in text
    assert failures.explain(MemoryError(), settings_of(ExportConfig)).text.endswith(
        "; close other programs, or take a machine with more"
    )


@pytest.mark.parametrize(
    "name", [name for names in failures.LESS_MEMORY.values() for name in names]
)
def test_every_setting_that_is_advised_is_one_of_some_verb(name: str) -> None:
    assert any(name in settings_of(schema) for schema in VERBS.values())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("connection of thoughts"),
        OSError(errno.EEXIST, "File exists", "runs"),
        KeyError("x"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_a_defect_of_ours_is_not_explained_away(error: BaseException) -> None:
    assert failures.explain(error) is None


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """The exit code of an action that fails so; ranks are not patient here."""
    monkeypatch.setattr(launching, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(launching, "FINE_PATIENCE_SECONDS", 0.05)
    stopping.forget()

    def run(error: BaseException) -> int:
        def action() -> None:
            raise error

        start_logging()
        return launching._outcome(action)

    return run


def as_rank(patch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        patch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunError("no"), ExitCode.MISTAKE),
        (MemoryError(), ExitCode.MISTAKE),
        (stopping.Stopped("asked"), ExitCode.AGAIN),
        (RuntimeError("Connection closed by peer"), ExitCode.ANOTHER_RANK),
        (LookupError("?"), ExitCode.DEFECT),
    ],
    ids=repr,
)
def test_every_end_has_its_exit_code(outcome, error: BaseException, code: ExitCode) -> None:
    assert outcome(error) == code


def test_a_mistake_of_one_rank_alone_is_said_by_it(outcome, monkeypatch, capsys) -> None:
    as_rank(monkeypatch, 1)
    assert outcome(RunError("runs/x is a file")) == 2
    assert capsys.readouterr().err == "rank 1: error: runs/x is a file\n"


def test_a_mistake_of_all_ranks_is_said_once(outcome, monkeypatch, capsys) -> None:
    """The launcher ends the others as soon as one has ended."""
    as_rank(monkeypatch, 1)
    monkeypatch.setattr(stopping, "wait_asked", lambda seconds: True)
    assert outcome(RunError("runs/x is a file")) == 2
    assert capsys.readouterr().err == ""


def test_a_traceback_names_its_rank(outcome, monkeypatch, capsys) -> None:
    as_rank(monkeypatch, 1)
    assert outcome(LookupError("?")) == 1
    assert capsys.readouterr().err.startswith("rank 1: Traceback")


def test_a_failing_run_that_is_asked_to_stop_says_why_it_failed(outcome, capsys) -> None:
    stopped = stopping.Stopped("asked")
    stopped.__context__ = RunError("the disk is full")
    assert outcome(stopped) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_the_save_that_failed_as_well_is_in_the_line(outcome, capsys) -> None:
    error = RunError("loss is no number")
    error.add_note("and the save in flight failed: the disk is full")
    assert outcome(error) == 2
    assert "no number; and the save in flight failed: the disk is full" in capsys.readouterr().err
