"""Texts that another project stored for promptsource's templates, against our own engine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from mhr_scale.tasks.t0.prompts import Prompter, Template, load_templates

SHARED = Path(os.environ.get("MHR_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("MHR_GOLDEN", SHARED / "golden"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = sorted(FOLDER.glob("prompted_*.jsonl")) or [None]
    metafunc.parametrize("stored", found, ids=lambda path: path.stem if path else "none")


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def folded(text: str) -> str:
    return " ".join(text.split())


def test_every_stored_text_comes_out_again(stored: Path | None, shared: Path) -> None:
    if stored is None:
        if "MHR_GOLDEN" in os.environ:
            pytest.skip(f"no prompted_*.jsonl in {FOLDER} (variable MHR_GOLDEN)")
        pytest.fail(f"no prompted_*.jsonl in {FOLDER}")
    task = stored.stem.removeprefix("prompted_")
    files = sorted((shared / "data" / "t0_eval_sets").glob(f"{task}.*validation.jsonl"))
    if not files:
        pytest.skip(f"no rows of {task}")
    rows = {row["idx"]: row for row in json_lines(files[0])}
    templates: dict[tuple[str, str | None], dict[str, Template]] = {}
    prompter, compared, different = Prompter(), 0, []
    for number, line in enumerate(json_lines(stored), start=1):
        source = line["dataset"], line["subset"]
        if source not in templates:
            folder = shared / "data" / "promptsource_templates" / "templates"
            templates[source] = {made.name: made for made in load_templates(folder, *source)}
        row = rows[line["idx"]]
        made = prompter.render(templates[source][line["template"]], row, row_id=str(line["idx"]))
        ours = (folded(made.input), folded(made.target)) if made else None
        theirs = (folded(line["input"]), folded(line["target"]))
        compared += 1
        if ours != theirs:
            different.append(f"line {number}, {line['template']}: {ours} is not {theirs}")
    assert compared > 0
    assert not different, f"{len(different)} of {compared} differ, first {different[0]}"
