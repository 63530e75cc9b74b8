"""Asynchronous I/O is compiled once, and said so; a lock that a killed process left is removed."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mhr_scale.engine import compiling
from mhr_scale.errors import EngineError


class Op:
    """A builder whose compiler writes one file; `fault` is what it fails with."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.n_loads = fault, 0

    def load(self, *, verbose: bool) -> None:
        folders = [compiling.build_folder(name) for name in compiling.NAMES]
        assert not any((folder / "lock").exists() for folder in folders)
        if self.fault:
            raise self.fault
        self.n_loads += 1
        (folders[-1] / "async_io.so").touch()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> Path:
    """The folder in which it is compiled, empty."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("mhr_scale"), "propagate", True)
    caplog.set_level(logging.INFO, logger="mhr_scale")
    return compiling.build_folder("async_io")


def plant(folder: Path, *, age: float) -> Path:
    """A lock as a killed process leaves it."""
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (time.time() - age, time.time() - age))
    return lock


def test_the_folder_is_named_before_it_is_compiled_and_only_then(place: Path, caplog: Any) -> None:
    op = Op()
    compiling.load_operation(op)
    assert f"compiling DeepSpeed's asynchronous I/O into {place} (once" in caplog.text
    caplog.clear()
    compiling.load_operation(op)
    assert caplog.text == ""
    assert op.n_loads == 2


@pytest.mark.parametrize("name", compiling.NAMES)
def test_a_lock_of_a_killed_process_is_removed_and_named(
    name: str, place: Path, caplog: Any
) -> None:
    lock = plant(compiling.build_folder(name), age=compiling.QUIET_SECONDS + 60)
    compiling.load_operation(Op())
    assert f"{lock}: removed, it was left by a process that was killed" in caplog.text


def test_a_young_lock_without_an_owner_is_refused_with_the_way_out(place: Path) -> None:
    """Another machine may compile in the same home folder."""
    lock = plant(place, age=10)
    with pytest.raises(EngineError, match=rf"^{lock}: left by a process .*; remove it, or start"):
        compiling.load_operation(Op())
    assert lock.exists()


def test_a_lock_that_a_process_has_open_is_left_to_it(place: Path, caplog: Any) -> None:
    lock = plant(place, age=1e6)
    code = f"import os, sys; os.open({str(lock)!r}, os.O_RDONLY); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        compiling.clear_lock(lock)
        owner.communicate(b"\n")
    assert f"{lock}: waiting for process {owner.pid}, which compiles there" in caplog.text
    assert lock.exists()


def test_compilers_of_a_killed_process_are_waited_for(place: Path, caplog: Any) -> None:
    lock = plant(place, age=10)
    command = [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(1)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=place) as compiler:
        assert compiler.stdout is not None
        compiler.stdout.readline()
        compiling.load_operation(Op())
        assert compiler.poll() == 0
    assert f"waiting for what a killed process left at work ({compiler.pid})" in caplog.text
    assert f"{lock}: removed" in caplog.text


def test_processes_compile_one_after_the_other(place: Path, caplog: Any) -> None:
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); "
        "fcntl.flock(file, fcntl.LOCK_EX); print(1, flush=True); time.sleep(1)"
    )
    command = [sys.executable, "-c", code, str(place.parent / compiling.TURN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        compiling.load_operation(Op())
        assert other.wait() == 0
    assert f"waiting for another process that compiles in {place.parent}" in caplog.text


def test_what_a_compiler_says_is_one_line(place: Path) -> None:
    op = Op(RuntimeError("Error building extension 'async_io'\nng++: fatal error"))
    with pytest.raises(EngineError, match=r"cannot be compiled \(Error building") as caught:
        compiling.load_operation(op)
    assert "\n" not in str(caught.value)
