"""The command for the day a GPU is there runs at toy size, goes on, and keeps what fails."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accept
import pytest
from board import Board, Found, Scale


def run(folder: Path, *words: str) -> tuple[int, Any]:
    code = accept.main(["--tiny", "--folder", str(folder), *words])
    return code, json.loads((folder / "accept.json").read_text(encoding="utf-8"))


def with_part(monkeypatch: pytest.MonkeyPatch, calls: list[str], *, is_broken: bool) -> None:
    """A part of two entries in place of the real ones."""

    def broken() -> Found:
        calls.append("second")
        if is_broken:
            raise RuntimeError("an illegal memory access")
        return Found({"ratio": 1.2}, holds=1.2 <= 1.3, goal="at most 1.3")

    def measure(board: Board, scale: Scale) -> None:
        board.run("first", lambda: calls.append("first") or Found({"x": 1}))
        board.run("second", broken)

    monkeypatch.setattr(accept, "PARTS", {"own": accept.Part("part_own", 1.0, "of a test")})
    monkeypatch.setitem(sys.modules, "part_own", SimpleNamespace(measure=measure))


def test_what_failed_is_repeated_and_what_is_done_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    with_part(monkeypatch, calls, is_broken=True)
    code, found = run(tmp_path)
    assert code == 1
    assert [entry["result"] for entry in found["entries"]] == ["", "error"]
    assert "an illegal memory access" in found["entries"][1]["error"]
    with_part(monkeypatch, calls, is_broken=False)
    code, found = run(tmp_path)
    assert code == 0
    assert calls == ["first", "second", "second"]
    assert [entry["result"] for entry in found["entries"]] == ["", "holds"]
    run(tmp_path, "--fresh")
    assert calls[3:] == ["first", "second"]


def test_what_had_no_time_is_said_and_run_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    with_part(monkeypatch, calls, is_broken=False)
    code, found = run(tmp_path, "--minutes", "0")
    assert (code, calls, found["left"]) == (1, [], 2)
    assert run(tmp_path)[0] == 0
    assert calls == ["first", "second"]


def test_every_part_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(tmp_path)
    failed = [entry for entry in found["entries"] if entry["result"] in ("error", "FAILS")]
    assert not failed
    assert code == 0
    assert {entry["part"] for entry in found["entries"]} == set(accept.PARTS)
    table = capsys.readouterr().out
    assert all(entry["name"] in table for entry in found["entries"])
