"""The verb `recipes`: those that come with the package, as a list, or one of them as a copy."""

import re
from collections.abc import Sequence
from pathlib import Path

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe import shipped
from mhr_scale.run.files import write_text

USAGE = "mhr_scale recipes [NAME] [--to FILE]"


def recipes(arguments: Sequence[str]) -> str:
    """The list of shipped recipes with the first sentence of each, or the text of one of them.

    With `--to` the text is written to a new file, whose path is returned. Raises `ConfigError` for
    a wrong command line, `RunError` for a file that is there or cannot be written.
    """
    if {"--help", "-h"} & set(arguments):
        return (
            f"{USAGE}\n\nwithout NAME: all recipes, and what each is for\nNAME: one of them, to "
            "be printed\n--to: a new file, or a folder, to copy it to\n"
        )
    names, target = parse(arguments)
    if not names:
        if target is not None:
            raise ConfigError(f"--to: no recipe named; usage: {USAGE}")
        return listed()
    source = shipped.recipe(names[0])
    text = source.read_text(encoding="utf-8")
    if target is None:
        return text
    file = target / source.name if target.is_dir() else target
    if file.exists():
        raise RunError(f"--to: '{file}' is there already; name a new file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise RunError(f"--to: cannot write '{file}' ({error.strerror}); name another") from error
    return f"{file}\n"


def parse(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The recipe named, if any, and where to copy it; `--to x` and `--to=x` are the same."""
    names: list[str] = []
    target: Path | None = None
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--to":
            value = value if equals else next(words, "")
            if not value:
                raise ConfigError(f"--to: no value; usage: {USAGE}")
            target = Path(value)
        elif word.startswith("-"):
            raise ConfigError(f"unknown option {word}; options: --to, --help")
        else:
            names.append(word)
    if len(names) > 1:
        raise ConfigError(f"one recipe at a time, got {' '.join(names)}; usage: {USAGE}")
    return names, target


def listed() -> str:
    """A line for every shipped recipe: its name, and the first sentence of its comment."""
    names = shipped.names(shipped.RECIPES, ".yaml")
    width = max(map(len, names))
    return "".join(f"{name:{width}}  {first_sentence(name)}\n" for name in names)


def first_sentence(name: str) -> str:
    """The comment that a recipe begins with, up to its first full stop; empty without one."""
    lines = shipped.recipe(name).read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"\.(?: (?=[A-Z])|$)", " ".join(comment), maxsplit=1)[0]
