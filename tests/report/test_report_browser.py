"""A report in a browser without a network: nothing is asked for, nothing fails, nothing overflows.

Every check is also made of a page that has the fault.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import made_runs
import pytest

from mhr_scale.report.build import build
from mhr_scale.report.page import render
from mhr_scale.report.runs import open_runs

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser ({', '.join(NAMES)}) to open a report in"
)
#: Where a request of a page would go; no name is ever resolved.
OUTSIDE = "http://outside.example"
PHONE = 390

#: Opens every fold of the framed page and tells its parent how wide it is.
MEASURE = """<script>
addEventListener("load", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const width = document.documentElement.clientWidth;
  const wide = [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > width + 1)
    .map(e => e.tagName);
  parent.postMessage({width, scroll: document.documentElement.scrollWidth, wide}, "*");
});
</script>"""
FRAME = """<!DOCTYPE html><body><iframe src="page.html" style="width:WIDTHpx;height:900px;border:0">
</iframe><script>
addEventListener("message", event => { document.body.dataset.found = JSON.stringify(event.data); });
</script>"""


class Seen:
    """What a browser made of a page."""

    def __init__(self, page: Path, folder: Path) -> None:
        """Open the page in a new profile with no way to any host."""
        assert BROWSER is not None
        log = folder / "net.json"
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--hide-scrollbars"]
        command += ["--disable-background-networking", "--disable-component-update"]
        command += ["--disable-sync", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
        command += ["--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
        folder.mkdir()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        self.dom = done.stdout
        self.console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        self.requests = requests(log)


def requests(log: Path) -> set[str]:
    """What a page asked for beyond its file; what the browser asks for itself has no origin."""
    events = json.loads(log.read_text(encoding="utf-8", errors="replace"))["events"]
    found = (event.get("params", {}) for event in events)
    return {
        params["url"]
        for params in found
        if "url" in params and params.get("initiator", "not an origin") != "not an origin"
    }


def measure(html: str, folder: Path) -> dict[str, object]:
    """Widths of a page in a frame as wide as a phone."""
    folder.mkdir()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]+>', html)
    assert policy is not None  # it lets no script run; this one is the test's own
    page = html.replace(policy[0], "").replace("</body>", MEASURE + "</body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(PHONE)), encoding="utf-8")
    found = re.search(r'data-found="([^"]+)"', Seen(frame, folder / "browser").dom)
    assert found is not None, "the page told no widths"
    widths: dict[str, object] = json.loads(found[1].replace("&quot;", '"'))
    return widths


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report on runs of every kind, with a name that wants to be a script."""
    folder = tmp_path_factory.mktemp("runs")
    made = made_runs.everything(folder)
    names = ["<script>console.error(1)</script>", "a_task_with_a_name_that_has_no_end_" * 3]
    made.append(made_runs.pretraining(folder / "odd", tasks=names))
    return render(build(open_runs([str(path) for path in made])))


@pytest.fixture(scope="module")
def seen(html: str, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("seen")
    (folder / "report.html").write_text(html, encoding="utf-8")
    return Seen(folder / "report.html", folder / "browser")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A page with the faults that a report must not have."""
    folder = tmp_path_factory.mktemp("faulty")
    page = folder / "page.html"
    page.write_text(
        f'<!DOCTYPE html><link rel="stylesheet" href="{OUTSIDE}/style.css">'
        "<body><script>console.error('told')</script></body>"
    )
    return Seen(page, folder / "browser")


def test_the_report_asks_for_nothing_outside(seen: Seen, faulty: Seen) -> None:
    assert f"{OUTSIDE}/style.css" in faulty.requests
    assert seen.requests == set()


def test_the_console_stays_empty(seen: Seen, faulty: Seen) -> None:
    assert any("told" in line for line in faulty.console)
    assert seen.console == []


def test_every_section_and_picture_is_there(html: str, seen: Seen) -> None:
    for kind in ("section", "svg", "figure", "table"):
        assert seen.dom.count(f"<{kind}") == html.count(f"<{kind}") > 0
    sections = re.findall(r'<section id="([^"]+)"', html)
    assert len(sections) == 12
    assert [name for name in sections if f'<section id="{name}"' not in seen.dom] == []


def test_names_from_files_run_no_script(seen: Seen) -> None:
    assert "<script" not in seen.dom
    assert "&lt;script&gt;console.error(1)&lt;/script&gt;" in seen.dom


def test_nothing_overflows_on_a_phone(html: str, tmp_path: Path) -> None:
    widths = measure(html, tmp_path / "report")
    assert widths == {"width": PHONE, "scroll": PHONE, "wide": []}


def test_an_overflow_would_be_seen(html: str, tmp_path: Path) -> None:
    wide = html.replace("<main>", '<main><div style="width: 600px">wide</div>')
    widths = measure(wide, tmp_path / "report")
    assert widths["wide"] == ["DIV"]
    assert isinstance(widths["scroll"], int)
    assert widths["scroll"] > PHONE
