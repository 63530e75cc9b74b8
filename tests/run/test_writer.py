"""Writes beside the caller: one at a time, and no error lost."""

import threading
from collections.abc import Callable

import pytest

from mhr_scale.errors import RunError
from mhr_scale.run.writer import Writer


def fail() -> None:
    raise RunError("the disk is full")


def submit_and_fail(write: Callable[[], object]) -> None:
    with Writer() as writer:
        writer.submit(write)
        raise ZeroDivisionError


def test_a_write_does_not_hold_up_the_caller() -> None:
    writer, may_end, ended = Writer(), threading.Event(), threading.Event()

    def write() -> None:
        may_end.wait(10)
        ended.set()

    writer.submit(write)
    writer.check()
    assert not ended.is_set()
    may_end.set()
    writer.wait()
    assert ended.is_set()


def test_the_next_write_waits_for_the_one_before() -> None:
    writer, order, may_end = Writer(), [], threading.Event()

    def first() -> None:
        may_end.wait(10)
        order.append("first")

    writer.submit(first)
    threading.Timer(0.1, may_end.set).start()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]


@pytest.mark.parametrize("how", ["wait", "submit", "check", "exit"])
def test_an_error_of_a_write_comes_out_of_the_next_call(how: str) -> None:
    writer = Writer()
    writer.submit(fail)
    while not writer._running.done():
        pass
    calls = {
        "wait": writer.wait,
        "check": writer.check,
        "submit": lambda: writer.submit(lambda: None),
        "exit": lambda: writer.__exit__(None, None, None),
    }
    with pytest.raises(RunError, match="the disk is full"):
        calls[how]()
    writer.wait()


def test_a_block_that_fails_waits_for_the_write_and_keeps_its_own_error() -> None:
    written = threading.Event()
    with pytest.raises(ZeroDivisionError):
        submit_and_fail(written.set)
    assert written.is_set()


def test_a_write_that_fails_under_a_failing_block_is_noted() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        submit_and_fail(fail)
    assert caught.value.__notes__ == ["and the save in flight failed: the disk is full"]
