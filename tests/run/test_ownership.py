"""One owner per folder: who has it, who may take it, and what is left behind."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mhr_scale.errors import RunError
from mhr_scale.run import ownership
from mhr_scale.run.ownership import LOCK

WAY_OUT = "use another run.folder"
owned = partial(ownership.owned, way_out=WAY_OUT)
HOLD = """
import sys, os
from pathlib import Path
from mhr_scale.run.ownership import owned
with owned(Path(sys.argv[1]), way_out=""):
    if "fork" in sys.argv and not os.fork():
        sys.stdin.read()
        os._exit(0)
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(lock: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(lock), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        yield process
        process.kill()


def text_of(lock: Path) -> dict[str, Any]:
    text: dict[str, Any] = json.loads(lock.read_text())
    return text


def leave_behind(lock: Path, **changes: Any) -> None:
    """The lock file of an owner that has ended without removing it."""
    with held_elsewhere(lock) as process:
        process.kill()
    lock.write_text(json.dumps({**text_of(lock), **changes}))


def test_an_owner_is_named_to_others(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / LOCK) as process:
        with pytest.raises(RunError) as caught, owned(tmp_path / LOCK):
            pass
        text = text_of(tmp_path / LOCK)
    assert f"{tmp_path}: in use by process {process.pid} on {text['host']}, since " in str(
        caught.value
    )
    assert "wait for its end, stop it, or use another run.folder" in str(caught.value)


def test_an_owned_folder_is_given_back(tmp_path: Path) -> None:
    with owned(tmp_path / LOCK):
        assert text_of(tmp_path / LOCK)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path / LOCK):
        pass


def test_a_folder_that_stays_empty_is_not_left(tmp_path: Path) -> None:
    with owned(tmp_path / "new" / "run" / LOCK):
        assert (tmp_path / "new" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_filled_stays(tmp_path: Path) -> None:
    with owned(tmp_path / "run" / LOCK):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_one_process_does_not_own_a_folder_twice(tmp_path: Path) -> None:
    with (
        owned(tmp_path / LOCK),
        pytest.raises(RunError, match="this process writes there already"),
        owned(tmp_path / ".." / tmp_path.name / LOCK),
    ):
        pass
    with owned(tmp_path / LOCK):
        pass


def test_a_killed_owner_is_displaced_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership.log, "propagate", True)
    with held_elsewhere(tmp_path / LOCK) as process:
        process.send_signal(signal.SIGKILL)
    with caplog.at_level(logging.WARNING), owned(tmp_path / LOCK):
        assert text_of(tmp_path / LOCK)["pid"] == os.getpid()
    assert f"taken over from process {process.pid} on " in caplog.text


def test_children_of_a_killed_owner_do_not_keep_its_folder(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / LOCK, "fork") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with owned(tmp_path / LOCK):
            assert text_of(tmp_path / LOCK)["pid"] == os.getpid()


def test_a_silent_owner_on_another_machine_is_displaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SILENCE_SECONDS", 0.2)
    leave_behind(tmp_path / LOCK, boot="another", host="far")
    with owned(tmp_path / LOCK):
        assert text_of(tmp_path / LOCK)["pid"] == os.getpid()


def test_a_beating_owner_on_another_machine_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SILENCE_SECONDS", 30.0)
    leave_behind(tmp_path / LOCK, boot="another", host="far")
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR)
    text, end = text_of(tmp_path / LOCK), threading.Event()

    def beat() -> None:
        number = 0
        while not end.wait(0.05):
            number += 1
            os.pwrite(descriptor, json.dumps({**text, "beat": number % 10}).encode(), 0)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with (
            pytest.raises(RunError, match="on far, since "),
            owned(tmp_path / LOCK),
        ):
            pass
    finally:
        end.set()
        beating.join()
        os.close(descriptor)


def test_an_owner_counts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.01)
    with owned(tmp_path / LOCK):
        beats = set()
        while len(beats) < 3:
            beats.add(text_of_when_whole(tmp_path / LOCK).get("beat", 0))
    assert max(beats) >= 2


def text_of_when_whole(lock: Path) -> dict[str, Any]:
    command = "import sys; print(open(sys.argv[1]).read())"  # a process of its own: see the module
    found = subprocess.run([sys.executable, "-c", command, str(lock)], capture_output=True)
    try:
        text: dict[str, Any] = json.loads(found.stdout)
    except ValueError:
        return {}
    return text


def test_an_owner_whose_lock_is_gone_ends_without_writing(tmp_path: Path) -> None:
    quick = "import mhr_scale.run.ownership as module; module.BEAT_SECONDS = 0.05\n"
    program = HOLD.replace("with owned", f"{quick}with owned")
    command = [sys.executable, "-c", program, str(tmp_path / LOCK)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "owned\n"
        (tmp_path / LOCK).unlink()
        assert process.wait(timeout=60) == 2
        assert "this process no longer owns it" in process.stderr.read()


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"pid": 3}', b"\xff"])
def test_a_lock_file_that_names_nobody_is_taken(tmp_path: Path, text: bytes) -> None:
    (tmp_path / LOCK).write_bytes(text)
    with owned(tmp_path / LOCK):
        assert text_of(tmp_path / LOCK)["pid"] == os.getpid()
