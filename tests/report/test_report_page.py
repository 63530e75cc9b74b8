"""The page: escaped, self-contained, the same every time, and small whatever it is about."""

import json
import math
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import made_runs
import pytest
from processes import succeed

from mhr_scale.report.build import build
from mhr_scale.report.page import CONTROLS, Table, render, show
from mhr_scale.report.runs import open_runs

SCRIPT = "<script>alert(1)</script>"


def report(*folders: Path) -> str:
    return render(build(open_runs([str(folder) for folder in folders])))


class Reader(HTMLParser):
    """What a page consists of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unnamed = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [str(values["id"])] if "id" in values else []
        names = ("href", "src", "xlink:href", "srcset", "data", "action")
        self.links += [str(values[name]) for name in names if name in values]
        self.unnamed += tag == "svg" and values.get("role") != "img"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of every kind."""
    return made_runs.everything(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(folders: list[Path]) -> str:
    """A report on runs of every kind."""
    return report(*folders)


def test_there_is_a_section_for_everything(whole: str) -> None:
    sections = re.findall(r'<section id="([^"]+)"', whole)
    assert sections == [
        "summary",
        "few-shot",
        "evaluations",
        "extra-steps",
        "learning",
        "validation-by-task",
        "alignment",
        "routing",
        "inventory",
        "parameters",
        "settings",
        "provenance",
    ]
    assert re.findall(r'<li><a href="#([^"]+)"', whole) == sections


def test_a_section_stands_only_where_there_is_something_to_show(tmp_path: Path) -> None:
    html = report(made_runs.evaluation(tmp_path, None, {"sort": 40.0}))
    sections = re.findall(r'<section id="([^"]+)"', html)
    assert sections == ["summary", "evaluations", "settings"]


def test_nothing_is_fetched(whole: str) -> None:
    links = Reader(whole).links
    assert links
    assert [link for link in links if not link.startswith(("#", "data:image/png;base64,"))] == []
    assert not re.search(r"@import|url\((?!#)", whole)


def test_there_is_no_script(whole: str) -> None:
    assert not {"script", "iframe", "object", "embed", "link"} & set(Reader(whole).tags)


def test_ids_are_unique_and_links_have_targets(whole: str) -> None:
    page = Reader(whole)
    assert len(page.ids) == len(set(page.ids))
    targets = {link[1:] for link in page.links if link.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", whole))
    assert targets <= set(page.ids)


def test_every_picture_has_a_name_and_its_numbers(whole: str) -> None:
    page = Reader(whole)
    n_pictures = page.tags.count("figure")
    assert n_pictures > 8
    assert page.tags.count("svg") == page.tags.count("figcaption") == n_pictures
    assert page.unnamed == 0
    assert len(re.findall(r"<svg [^>]*>\s*<title>[^<]+</title>", whole)) == n_pictures
    assert whole.count("<summary>Numbers of figure ") == n_pictures


def test_the_same_folders_give_the_same_bytes_in_another_process(
    folders: list[Path], whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    file = tmp_path / "report.html"
    words = [*map(str, folders), f"--file={file}"]
    succeed("launch/report.py", *words)
    assert file.read_text(encoding="utf-8") == whole


def test_the_file_says_nothing_of_the_time_it_was_made(whole: str) -> None:
    assert "dc:date" not in whole
    assert "matplotlib.org" not in whole


def test_names_from_files_are_text(tmp_path: Path) -> None:
    names = [SCRIPT, 'a"b&c', "$x_1$", "tab\there", "\u00fcber\u2028", "]]>", "\x00", "\\frac"]
    made_runs.pretraining(tmp_path / "run", tasks=names)
    points = dict.fromkeys(names, 50.0)
    made_runs.evaluation(tmp_path / "scores", None, points, prompts=names)
    made_runs.few_shot(tmp_path / "jobs", tasks=names[:2])
    html = report(tmp_path / "run", tmp_path / "scores", tmp_path / "jobs")
    assert "script" not in Reader(html).tags
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    for text in (html, pictures):
        for name in names[:3]:
            assert escape(name, quote=False) in text.replace("&#34;", '"')


def test_settings_commands_and_titles_are_text(tmp_path: Path) -> None:
    folder = made_runs.pretraining(tmp_path / SCRIPT.replace("/", "_"))
    starts = json.loads((folder / "provenance.json").read_text())
    starts[0]["argv"], starts[0]["versions"] = [SCRIPT], {SCRIPT: SCRIPT}
    (folder / "provenance.json").write_text(json.dumps(starts))
    page = build(open_runs([str(folder)]), title=SCRIPT)
    assert "script" not in Reader(render(page)).tags


def test_what_moves_a_terminals_cursor_or_turns_text_is_spelt_out(tmp_path: Path) -> None:
    name = "bell\x07 red\x1b[31m csi\x9b2J turned\u202etxt"
    made_runs.pretraining(tmp_path / "run", tasks=(name, "copy"))
    made_runs.few_shot(tmp_path / "few", tasks=(name, "copy"))
    made_runs.evaluation(tmp_path / "scored", None, {name: 5.0})
    folders = [str(tmp_path / part) for part in ("run", "few", "scored")]
    html = render(build(open_runs(folders)))
    assert not CONTROLS.search(html)
    for text in ("bell\\x07", "\\x1b[31m", "\\x9b2J", "\\u202etxt"):
        assert text in html


def test_one_is_singular(tmp_path: Path) -> None:
    made_runs.pretraining(tmp_path / "run", tasks=("sort",), steps=1)
    made_runs.few_shot(tmp_path / "few", tasks=("sort",), seeds=(0,))
    made_runs.evaluation(tmp_path / "scored", None, {"sort": 5.0})
    made_runs.analysis(tmp_path / "analysis", n_tasks=1)
    folders = [str(tmp_path / part) for part in ("run", "few", "scored", "analysis")]
    html = render(build(open_runs(folders)))
    for text in ("1 pre-training run, 1 few-shot run, 1 evaluation", "finished, 1 step<"):
        assert text in html
    assert not re.search(r"\b1 (tasks|steps|runs|rows|jobs|examples|settings|variants)\b", html)


def test_the_listing_of_a_recipe_has_what_is_set(tmp_path: Path) -> None:
    html = render(build(open_runs([str(made_runs.pretraining(tmp_path))])))
    (listing,) = [part for part in html.split("<details>") if ": config.yaml</summary>" in part]
    assert "name: builtin:toy" in listing
    assert "null" not in listing


def test_an_unpaired_surrogate_does_no_harm(tmp_path: Path) -> None:
    html = report(made_runs.pretraining(tmp_path, tasks=["\ud800", "b"]))
    assert html.encode("utf-8")


def test_numbers_that_are_none_are_shown_as_such(tmp_path: Path) -> None:
    folder = made_runs.pretraining(tmp_path, steps=6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[2]["loss"], lines[3]["loss"], lines[4]["grad_norm"] = math.nan, math.inf, -math.inf
    lines[-1]["validation_loss_by_task"]["sort"] = math.nan
    made_runs.write_lines(folder / "metrics.jsonl", lines)
    html = report(folder)
    assert "loss is not finite at step 2 (nan), step 3 (inf)" in html
    assert "grad_norm is not finite at step 4 (-inf)" in html
    assert '<td class="n">nan</td>' in html


def test_a_run_whose_losses_are_all_no_numbers_is_reported(tmp_path: Path) -> None:
    folder = made_runs.pretraining(tmp_path, steps=3, extra={"loss": math.nan})
    assert "loss is not finite at step 1 (nan), step 2 (nan), step 3 (nan)" in report(folder)


def test_many_tasks_and_many_steps_make_no_large_file(tmp_path: Path) -> None:
    tasks = [f"task{number:03d}_with_a_rather_long_name_generation" for number in range(313)]
    trained = made_runs.pretraining(tmp_path / "run", steps=20_000, tasks=tasks)
    found = made_runs.analysis(tmp_path / "found", n_tasks=313, n_groups=216, n_skills=8)
    html = report(trained, found)
    assert len(html) < 5_000_000
    assert "a point is the mean of up to 80 neighbouring values, the band their range" in html
    assert html.count("task312_with_a_rather_long_name_generation") == 1  # in the numbers
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "rather_long" not in pictures
    heights = [float(box) for box in re.findall(r'viewBox="0 0 \S+ (\S+)"', html)]
    assert max(heights) < 12 * 72


def test_a_small_run_is_not_thinned(tmp_path: Path) -> None:
    assert "neighbouring values" not in report(made_runs.pretraining(tmp_path))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (1234567, "1,234,567"),
        (0.5, "0.5"),
        (1e-5, "1.00e-05"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        ("x", "x"),
        (12345.6, "12,346"),
    ],
)
def test_values_read_well(value: object, text: str) -> None:
    assert show(value) == text  # type: ignore[arg-type]


def test_a_large_table_is_tab_separated_text() -> None:
    rows = [[f"row {n}", *([0.5] * 100)] for n in range(100)]
    table = Table(caption="large", columns=["", *map(str, range(100))], rows=rows, decimals=1)
    assert table.is_large
    assert table.text.splitlines()[1].split("\t")[:2] == ["row 0", "0.5"]
