"""The verb `report`: run folders in, one self-contained HTML file out.

Runs may be of any kind, finished or not; what a run lacks is left out of the report.
"""

from collections.abc import Sequence
from pathlib import Path

from mhr_scale.errors import ConfigError, RunError, counted, did_you_mean
from mhr_scale.report.runs import open_runs
from mhr_scale.run.files import write_text

USAGE = "mhr_scale report FOLDER [FOLDER ...] [--file report.html] [--title TITLE]"
OPTIONS = ("--file", "--title")


def report(arguments: Sequence[str]) -> str:
    """Write the report that a command line asks for; returns the closing message.

    Raises `ConfigError` for a wrong command line, `RunError` for folders that are no runs.
    """
    if {"--help", "-h"} & set(arguments):
        return (
            f"{USAGE}\n\nFOLDER: a run of any kind, finished or not\n--file: where to write; "
            "default: report.html in the first folder\n--title: of the page\n"
        )
    folders, options = parse(arguments)
    if not folders:
        raise ConfigError(f"no run given; usage: {USAGE}")
    runs = open_runs(folders)

    from mhr_scale.report.build import build  # needs matplotlib
    from mhr_scale.report.page import render

    html = render(build(runs, title=options.get("--title")))
    file = Path(options.get("--file", str(runs[0].folder / "report.html")))
    if file.is_dir():
        raise ConfigError(f"--file: '{file}' is a folder; name a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, html)
    except OSError as error:
        raise RunError(f"--file: cannot write '{file}' ({error.strerror}); name another") from error
    return f"{file}  ({counted(len(runs), 'run')}, {len(html.encode()) / 1e6:.1f} MB)\n"


def parse(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Folders and options of a command line; `--file x` and `--file=x` are the same."""
    folders: list[str] = []
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            folders.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in OPTIONS:
            hint, known = did_you_mean(name, OPTIONS), ", ".join([*OPTIONS, "--help"])
            raise ConfigError(f"unknown option {name}; options: {known}{hint}")
        value = value if equals else next(words, "")
        if not value:
            raise ConfigError(f"{name}: no value; usage: {USAGE}")
        options[name] = value
    return folders, options
