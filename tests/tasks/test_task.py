"""Places of rows, how many refused rows are borne, and rows set aside for validation."""

import json

import pytest

from mhr_scale.errors import DataError
from mhr_scale.tasks.task import Example, Intake, Place, hold_out


def refuse(intake, count=1, text="{}"):
    for line in range(1, count + 1):
        place = Place(file="a.jsonl", line=line)
        intake.refuse(place=place, task="t", reason="empty input", text=text)


def take(intake, count):
    for _ in range(count):
        intake.take()


def test_a_place_reads_as_file_and_line():
    assert str(Place(file="a.jsonl", line=7)) == "a.jsonl:7"


def test_ten_refused_rows_are_tolerated():
    intake = Intake()
    refuse(intake, 10)
    intake.check()


def test_the_eleventh_refused_row_of_a_small_set_stops():
    intake = Intake()
    refuse(intake, 11)
    with pytest.raises(DataError, match=r"11 of 11 rows refused, first a\.jsonl:1: empty input"):
        intake.check()


def test_a_thousandth_of_a_large_set_is_tolerated():
    intake = Intake()
    take(intake, 19_980)
    refuse(intake, 20)
    intake.check()


def test_more_than_a_thousandth_of_a_large_set_stops():
    intake = Intake()
    take(intake, 19_978)
    refuse(intake, 21)
    with pytest.raises(DataError, match="21 of 19999 rows refused"):
        intake.check()


def test_skip_never_stops():
    intake = Intake(on_bad="skip")
    refuse(intake, 1000)
    intake.check()


def test_error_stops_at_the_first_row():
    with pytest.raises(DataError, match=r"a\.jsonl:1: empty input \(task t\)"):
        refuse(Intake(on_bad="error"))


def test_a_reject_keeps_the_first_200_characters():
    intake = Intake()
    refuse(intake, text="x" * 1000)
    assert intake.rejects[0].text == "x" * 200


def test_rejects_are_written_as_json_lines(tmp_path):
    intake = Intake()
    refuse(intake, 2, text="\u00e9")
    intake.write(tmp_path / "rejects.jsonl")
    lines = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"place": f"a.jsonl:{n}", "task": "t", "reason": "empty input", "text": "\u00e9"}
        for n in (1, 2)
    ]


def test_a_reject_with_an_unpaired_surrogate_can_be_written_and_read_back(tmp_path):
    intake = Intake()
    refuse(intake, text="\ud800")
    intake.write(tmp_path / "rejects.jsonl")
    written = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8")
    assert json.loads(written)["text"] == "\ud800"


def held_out(count, *, most=100, seed=1, name="t"):
    rows = [Example(id=str(number), input="x", targets=("y",)) for number in range(count)]
    train, validation = hold_out(rows, most=most, seed=seed, name=name)
    return [int(row.id) for row in train], [int(row.id) for row in validation]


@pytest.mark.parametrize(
    ("count", "most", "n_held_out"), [(29, 100, 2), (9, 100, 0), (1500, 100, 100), (100, 3, 3)]
)
def test_a_tenth_of_the_rows_is_set_aside_and_no_more_than_asked_for(count, most, n_held_out):
    train, validation = held_out(count, most=most)
    assert (len(train), len(validation)) == (count - n_held_out, n_held_out)


def test_rows_set_aside_are_not_trained_on_and_all_keep_their_order():
    train, validation = held_out(50)
    assert sorted(train + validation) == list(range(50))
    assert (sorted(train), sorted(validation)) == (train, validation)


def test_a_raw_row_is_set_aside_with_all_its_prompts_and_counts_once():
    rows = [
        Example(id=f"{n}/{prompt}", prompt=prompt, input=f"{prompt} {n}", targets=("y",))
        for prompt in "abc"
        for n in range(20)
    ]
    train, validation = hold_out(rows, most=100, seed=1, name="t")
    assert len(validation) == 2 * 3
    assert len(train) == 18 * 3
    assert not {row.raw_id for row in train} & {row.raw_id for row in validation}
    plain = [Example(id=str(n), input=str(n), targets=("y",)) for n in range(20)]
    _, alone = hold_out(plain, most=100, seed=1, name="t")
    assert {row.raw_id for row in validation} == {row.id for row in alone}


def test_the_rows_set_aside_follow_from_seed_and_task_alone():
    assert held_out(200) == held_out(200)
    chosen = {tuple(held_out(200, **change)[1]) for change in ({}, {"seed": 2}, {"name": "u"})}
    assert len(chosen) == 3
