"""Folders that are whole or not there."""

import json
from pathlib import Path

import pytest

from mhr_scale.errors import RunError
from mhr_scale.run.folders import DONE, check, moved_into_place, recover, sealed, unseal


def seal(folder: Path, text: str = "some text") -> Path:
    with sealed(folder) as partial:
        (partial / "a.txt").write_text(text)
        (partial / "below").mkdir()
        (partial / "below" / "b.bin").write_bytes(b"\x00\x01")
    return folder


def test_a_sealed_folder_lists_its_files_with_sizes_and_hashes(tmp_path: Path) -> None:
    folder = seal(tmp_path / "steps" / "000001")
    files = json.loads((folder / DONE).read_text())["files"]
    assert {name: facts["bytes"] for name, facts in files.items()} == {
        "a.txt": 9,
        "below/b.bin": 2,
    }
    check(folder)


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill_half() -> None:
        with sealed(tmp_path / "new") as partial:
            (partial / "a.txt").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_half()
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = seal(tmp_path / "old")
    with pytest.raises(ZeroDivisionError), sealed(folder):
        raise ZeroDivisionError
    check(folder)
    assert (folder / "a.txt").read_text() == "some text"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = seal(seal(tmp_path / "old"), "other text")
    check(folder)
    assert (folder / "a.txt").read_text() == "other text"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.txt").write_text("same size"[::-1]), "a.txt: damaged, its hash"),
        (lambda f: (f / "a.txt").write_text("longer than it was"), "a.txt: 18 bytes, 9 were"),
        (lambda f: (f / "below" / "b.bin").unlink(), "b.bin: missing, though DONE lists it"),
        (lambda f: (f / DONE).write_text("{"), "DONE: not a readable list of files"),
        (lambda f: (f / DONE).write_text("[]"), "DONE: not a readable list of files"),
        (lambda f: (f / DONE).write_bytes(b"\xff\xfe"), "DONE: not a readable list of files"),
        (
            lambda f: (f / DONE).write_text('{"files": {"../x": {}}}'),
            "names '../x', which is no file of this folder",
        ),
        (
            lambda f: (f / DONE).write_text('{"files": {"/etc/passwd": {}}}'),
            "names '/etc/passwd', which is no file of this folder",
        ),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named(tmp_path: Path, damage, message) -> None:
    folder = seal(tmp_path / "one")
    damage(folder)
    with pytest.raises(RunError) as caught:
        check(folder)
    assert message in str(caught.value)


def test_a_folder_of_an_earlier_version_has_an_empty_list_and_passes(tmp_path: Path) -> None:
    folder = seal(tmp_path / "one")
    (folder / DONE).write_text("")
    check(folder)


def test_what_died_amid_a_replacement_comes_back_and_halves_go(tmp_path: Path) -> None:
    seal(tmp_path / "one").rename(tmp_path / ".one.old.tmp")
    seal(tmp_path / "two")
    seal(tmp_path / ".two.old.tmp", "older text")
    (tmp_path / ".three.tmp").mkdir()
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    check(tmp_path / "one")
    assert (tmp_path / "two" / "a.txt").read_text() == "some text"


def test_a_folder_is_removed_seal_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = seal(tmp_path / "one")
    monkeypatch.setattr("shutil.rmtree", lambda path: None)
    unseal(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "below"]


# -- new folders -----------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    with moved_into_place(tmp_path / "new") as left:
        pass
    (tmp_path / "new").rmdir()
    left.mkdir()
    (left / "half").touch()
    with moved_into_place(tmp_path / "new") as folder:
        (folder / "whole").touch()
    assert (names(tmp_path), names(tmp_path / "new")) == (["new"], ["whole"])


def test_folders_of_the_same_name_are_filled_at_once(tmp_path: Path) -> None:
    targets = (tmp_path / "a" / "new", tmp_path / "b" / "new")
    with moved_into_place(targets[0]) as one, moved_into_place(targets[1]) as other:
        (one / "one").touch()
        (other / "other").touch()
    assert names(tmp_path) == ["a", "b"]
    assert (names(tmp_path / "a" / "new"), names(tmp_path / "b" / "new")) == (["one"], ["other"])


def test_a_target_that_is_being_filled_is_taken(tmp_path: Path) -> None:
    with moved_into_place(tmp_path / "new") as folder:
        (folder / "file").touch()
        again = moved_into_place(tmp_path / "new")
        with pytest.raises(RunError, match="name another folder"), again:
            pass
    assert names(tmp_path / "new") == ["file"]


def test_a_target_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(RunError, match="is not empty"), moved_into_place(tmp_path / "new"):
        pass
    assert names(tmp_path) == ["new"]
