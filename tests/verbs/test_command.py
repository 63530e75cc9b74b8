"""The command `mhr_scale`: its verbs, its help, and the recipes that it lists and copies."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from processes import ROOT

from mhr_scale import config
from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.command import VERBS, command
from mhr_scale.verbs.recipes import recipes

TOY = (ROOT / "launch" / "recipes" / "toy.yaml").read_text()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Calls the command; returns its exit code and what it wrote to stdout and stderr."""

    def call(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["mhr_scale", *words])
        with pytest.raises(SystemExit) as left:
            command()
        return left.value.code, *capfd.readouterr()

    return call


def test_help_has_a_line_for_every_verb(call) -> None:
    for words in (("--help",), ("--local_rank=0", "-h")):
        code, out, _ = call(*words)
        assert (code, re.findall(r"^    (\w+) +(\S.*)$", out, flags=re.MULTILINE)) == (
            0,
            [(name, verb.line) for name, verb in VERBS.items()],
        )


def test_the_version_is_the_installed_one(call) -> None:
    assert call("--version")[:2] == (0, f"mhr_scale {metadata.version('mhr_scale')}\n")


def test_every_verb_has_a_help_page_that_says_how_to_call_it(call) -> None:
    for name, verb in VERBS.items():
        code, out, _ = call("--local_rank=1", name, "--help")
        assert code == 0
        assert f"mhr_scale {name} " in out
        assert (f"--module mhr_scale {name}" in out) == verb.has_ranks
        assert ("--schema" in out) == (verb.schema is not None)
        assert verb.schema is None or hasattr(config, verb.schema)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", "no verb given; one of pretrain, average, "),
        ("pretrian toy", "unknown verb 'pretrian'; did you mean 'pretrain'?\n"),
        ("xyz", "unknown verb 'xyz'; one of pretrain, average, "),
        ("--verbose", "unknown verb '--verbose'; one of pretrain, "),
        (
            "pretrain",
            "no recipe given; usage: mhr_scale pretrain RECIPE [a.b=value ...]",
        ),
        ("pretrain toi", "toi: cannot be read (No such file or directory); did you mean 'toy'?\n"),
        ("plan --schema", "unknown option --schema; options: --json, --help\n"),
        ("recipes toi", "no shipped recipe 'toi'; did you mean 'toy'?; `mhr_scale recipes` lists"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    call, words: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {error}")


def test_a_shipped_recipe_goes_by_its_name_and_a_file_here_comes_first(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pages = [call("pretrain", name, "--print") for name in ("toy", "launch/recipes/toy.yaml")]
    assert pages[0] == pages[1]
    Path("toy.yaml").write_text(TOY.replace("runs/toy", "runs/mine"))
    assert load(config.PretrainConfig, "toy.yaml").run.folder == "runs/mine"
    assert load(config.PretrainConfig, "toy").run.folder == "runs/toy"
    assert recipes(["toy.yaml"]) == TOY


def test_recipes_are_listed_with_their_first_sentence() -> None:
    lines = recipes([]).splitlines()
    assert any(re.fullmatch(r"toy +The built-in toy suite: .*", line) for line in lines)
    assert all(re.fullmatch(r"\S+  +\S.*[^.]", line) for line in lines)
    assert any("(Caccia et al. 2022, section 5)" in line for line in lines)


def test_a_recipe_is_copied_to_a_new_file(tmp_path: Path) -> None:
    for words, file in (
        (["toy", "--to", str(tmp_path / "new" / "mine.yaml")], tmp_path / "new" / "mine.yaml"),
        ([f"--to={tmp_path}", "demo/lora"], tmp_path / "lora.yaml"),
    ):
        assert recipes(words) == f"{file}\n"
        assert load(config.PretrainConfig, file)
        with pytest.raises(RunError, match="is there already"):
            recipes(words)
    assert (tmp_path / "new" / "mine.yaml").read_text() == TOY


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["toy", "--to"], "--to: no value"),
        (["--to", "x"], "--to: no recipe named"),
        (["toy", "demo/mhr"], "one recipe at a time, got toy demo/mhr"),
        (["toy", "--too=x"], "unknown option --too=x; options: --to, --help"),
        (["../README.md"], "no shipped recipe '../README.md'"),
        (["README.md"], "no shipped recipe 'README.md'"),
        (["ds_configs/zero3.json"], "no shipped recipe"),
    ],
)
def test_recipes_refuses_what_it_cannot_do(words: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(error)}"):
        recipes(words)
