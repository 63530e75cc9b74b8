"""What a run writes about itself as it goes: metrics, provenance, progress."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest

from mhr_scale.errors import RunError
from mhr_scale.run import runlog
from mhr_scale.run.files import write_json, write_text
from mhr_scale.run.runlog import Metrics, Progress, RecentSteps, as_time, record_provenance


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_steps(path, *steps, end=""):
    lines = [json.dumps({"step": step, "loss": 1.0 / (step + 1)}) + "\n" for step in steps]
    path.write_text("".join(lines) + end)


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def lines(monkeypatch):
    """The package's log lines, level and text."""
    seen = []

    class Handler(logging.Handler):
        def emit(self, record):
            seen.append((record.levelname, record.getMessage()))

    monkeypatch.setattr(runlog.log, "handlers", [Handler()])
    monkeypatch.setattr(runlog.log, "propagate", False)
    level = runlog.log.level
    runlog.log.setLevel(logging.INFO)
    yield seen
    runlog.log.setLevel(level)


# -- metrics --------------------------------------------------------------------------------------


def test_every_line_is_an_object_of_its_own(path):
    metrics = Metrics(path, resume_step=0)
    metrics.write({"step": 1, "loss": 0.5})
    metrics.write({"step": 2, "loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]


def test_a_line_of_the_step_resumed_from_is_there_once(path):
    line, sent = {"step": 2, "score": 50.0}, []
    for resume_step in (-1, 2, 2):
        metrics = Metrics(path, resume_step=resume_step, also=sent.append)
        metrics.write(line)
        metrics.write({"step": 2 + len(sent), "score": 50.0})
    assert steps_of(path) == [2, 5]
    assert sent.count(line) == 1


def test_a_line_can_be_read_as_soon_as_it_is_written(path):
    Metrics(path, resume_step=0).write({"step": 1})
    assert steps_of(path) == [1]


def test_a_new_run_makes_no_file_before_its_first_line(path):
    Metrics(path, resume_step=0)
    assert not path.exists()


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(0, [0]), (2, [0, 2]), (3, [0, 2]), (4, [0, 2, 4]), (9, [0, 2, 4])]
)
def test_lines_after_the_step_resumed_from_are_dropped(path, resume_step, kept):
    write_steps(path, 0, 2, 4)
    Metrics(path, resume_step=resume_step)
    assert steps_of(path) == kept


def test_a_resumed_run_has_every_step_once(path):
    write_steps(path, 1, 2, 3, 4, 5)
    metrics = Metrics(path, resume_step=3)
    for step in (4, 5, 6):
        metrics.write({"step": step})
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]


def test_several_lines_of_one_step_are_kept(path):
    """A validation is a line of its own."""
    write_steps(path, 2, 2, 4, 4)
    Metrics(path, resume_step=2)
    assert steps_of(path) == [2, 2]


def test_kept_lines_are_not_rewritten(path):
    line = '{"step":1,  "loss": 1e-3}\n'
    path.write_text(line)
    Metrics(path, resume_step=1)
    assert path.read_text() == line


@pytest.mark.parametrize(
    "torn",
    ['{"step": 3, "lo', "{", "\0\0\0\0", '{"loss": 1.0}', "7", "null", "[]"],
)
def test_a_torn_last_line_is_dropped(path, torn):
    write_steps(path, 1, 2, end=torn)
    Metrics(path, resume_step=9).write({"step": 3})
    assert steps_of(path) == [1, 2, 3]


def test_bytes_that_are_no_text_are_dropped(path):
    write_steps(path, 1, 2)
    path.write_bytes(path.read_bytes() + b'{"step": 3, "\xff\xfe')
    Metrics(path, resume_step=9)
    assert steps_of(path) == [1, 2]


def test_a_last_line_that_only_lacks_its_newline_is_kept(path):
    write_steps(path, 1, end='{"step": 2}')
    Metrics(path, resume_step=9).write({"step": 3})
    assert steps_of(path) == [1, 2, 3]


def test_a_dropped_line_is_reported_with_its_place(path, lines):
    write_steps(path, 1, 2, end='{"step')
    Metrics(path, resume_step=9)
    assert lines == [("WARNING", f"{path}:3: torn line dropped")]


# -- whole files ----------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a long text that was here before")
    write_text(file, "short\n")
    assert file.read_text() == "short\n"


def test_no_partial_file_is_left(tmp_path):
    write_text(tmp_path / "config.yaml", "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_the_rest_of_a_broken_write_does_no_harm(tmp_path):
    (tmp_path / ".config.yaml.tmp").write_text("half of a much longer text")
    write_text(tmp_path / "config.yaml", "x")
    assert (tmp_path / "config.yaml").read_text() == "x"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "config.yaml"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new \ud800")
    assert file.read_text() == "old"


def test_a_reader_with_the_old_file_open_goes_on_reading_it(tmp_path):
    file = tmp_path / "config.yaml"
    write_text(file, "old")
    with file.open() as reader:
        write_text(file, "new")
        assert reader.read() == "old"


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "a", "\u00e9")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9"


def test_json_is_written_with_an_ending(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    assert (tmp_path / "a.json").read_text() == '{\n "b": [\n  1\n ]\n}\n'


def test_values_that_json_lacks_are_written_as_text(tmp_path):
    write_json(tmp_path / "a.json", {"where": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {"where": str(tmp_path)}


# -- provenance -----------------------------------------------------------------------------------


def test_every_start_adds_an_entry(tmp_path):
    file = tmp_path / "provenance.json"
    for resumed_from in (None, 4, 8):
        record_provenance(file, resumed_from=resumed_from)
    assert [entry["resumed_from"] for entry in json.loads(file.read_text())] == [None, 4, 8]


def test_an_earlier_entry_stays_as_it_was(tmp_path):
    file = tmp_path / "provenance.json"
    record_provenance(file, world_size=1)
    (first,) = json.loads(file.read_text())
    record_provenance(file, world_size=2)
    assert json.loads(file.read_text())[0] == first


def test_an_entry_tells_command_code_versions_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "toy.yaml"])
    record_provenance(tmp_path / "provenance.json")
    (entry,) = json.loads((tmp_path / "provenance.json").read_text())
    assert entry["argv"] == ["pretrain.py", "toy.yaml"]
    assert entry.keys() >= {"started", "git_commit", "python", "platform", "host"}
    assert entry["versions"].keys() >= {"mhr_scale", "torch", "deepspeed", "transformers"}


def test_a_package_that_is_not_there_is_called_absent(monkeypatch):
    monkeypatch.setattr(runlog, "PACKAGES", ("no-such-package-anywhere",))
    assert runlog.provenance()["versions"] == {"no-such-package-anywhere": "absent"}


@pytest.mark.parametrize("content", [b"[{", b"\xff\xfe", b"{}", b""])
def test_a_broken_file_of_starts_is_not_overwritten(tmp_path, content):
    file = tmp_path / "provenance.json"
    file.write_bytes(content)
    with pytest.raises(RunError) as caught:
        record_provenance(file)
    assert str(caught.value).startswith(f"{file}:")
    assert ": not " in str(caught.value)
    assert str(caught.value).endswith("; move it away")
    assert file.read_bytes() == content


# -- ranks and log lines --------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    def set_environment(**values):
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_without_a_launcher_there_is_one_rank(environment):
    environment()
    assert (runlog.rank(), runlog.world_size()) == (0, 1)


def test_the_launcher_says_which_rank_this_is(environment):
    environment(RANK="2", WORLD_SIZE="4")
    assert (runlog.rank(), runlog.world_size()) == (2, 4)


@pytest.mark.parametrize(
    ("rank", "heard"), [("0", ["told", "warned", "failed"]), ("1", ["failed"])]
)
def test_other_ranks_are_silent_unless_something_is_wrong(environment, lines, capsys, rank, heard):
    environment(RANK=rank)
    runlog.start_logging()
    runlog.log.info("told")
    runlog.log.warning("warned")
    runlog.log.error("failed")
    assert capsys.readouterr().err.split() == heard


def test_a_terminal_obeys_nothing_of_what_is_logged(environment, lines, capsys):
    environment(RANK="0")
    runlog.start_logging()
    runlog.log.info("two\nlines of %s", "a\x1b[2J\x07\u202eb")
    assert capsys.readouterr().err == "two\nlines of a\\x1b[2J\\x07\\u202eb\n"


def test_log_lines_do_not_reach_other_loggers(lines):
    runlog.start_logging()
    assert not runlog.log.propagate


# -- progress -------------------------------------------------------------------------------------


def not_a_terminal(monkeypatch):
    stream = SimpleNamespace(isatty=lambda: False, write=len, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", stream)


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, lines):
    not_a_terminal(monkeypatch)
    progress = Progress(4, start=1, what="pretrain", every_seconds=-1.0)
    for step in (2, 3, 4):
        progress.advance(f"loss {step}")
    progress.close()
    assert [text.split("  ")[:2] for _, text in lines] == [
        ["pretrain 2/4", "loss 2"],
        ["pretrain 3/4", "loss 3"],
        ["pretrain 4/4", "loss 4"],
    ]


def test_the_progress_line_tells_means_of_the_last_steps_and_of_how_many():
    recent = RecentSteps()
    assert recent.add({"loss": 4.0}) == "loss 4.0000"
    recent = RecentSteps()
    assert recent.add({"loss": 4.0, "tokens": 100, "seconds": 0.5}) == "loss 4.0000, 200 tokens/s"
    second = recent.add({"loss": 2.0, "tokens": 500, "seconds": 0.5})
    assert second == "loss 3.0000, 600 tokens/s (mean of 2 steps)"
    for _ in range(60):
        last = recent.add({"loss": 1.0, "tokens": 10, "seconds": 1.0})
    assert last == "loss 1.0000, 10 tokens/s (mean of 50 steps)"


def test_time_left_beyond_a_day_is_told_in_days():
    assert [as_time(299.6), as_time(93784.0)] == ["0:05:00", "1 day, 2:03:04"]


def test_a_short_run_has_one_line_at_its_end(monkeypatch, lines):
    not_a_terminal(monkeypatch)
    progress = Progress(3, start=0, what="pretrain", every_seconds=3600.0)
    for _ in range(3):
        progress.advance("loss 1")
    progress.close()
    assert [text.split("  ")[0] for _, text in lines] == ["pretrain 3/3"]
