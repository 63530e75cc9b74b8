"""A sample of the damaged inputs that `mutations.py` makes by the thousand."""

import pytest
from cases import HARMLESS, REFUSED, half_written, make_case, run_case
from doors import KINDS
from originals import RUN, Originals, evaluation_words
from processes import run
from small_runs import TOY

SEED, CASES = 7, 6


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield Originals(tmp_path_factory.mktemp("mutations") / "originals")


@pytest.mark.parametrize("name", KINDS)
def test_undamaged_input_passes_its_door(name, originals, tmp_path):
    outcome = run_case(name, originals, tmp_path, seed=SEED, number=-1)
    assert outcome.label == HARMLESS, outcome


@pytest.mark.parametrize("name", KINDS)
def test_damaged_input_is_harmless_or_refused_in_one_line_that_names_it(name, originals, tmp_path):
    for number in range(CASES):
        outcome = run_case(name, originals, tmp_path, seed=SEED, number=number)
        assert not outcome.is_finding, outcome


LAUNCHED = {
    "pretrain recipe": lambda place: ["launch/pretrain.py", f"{place}/pretrain recipe/recipe.yaml"],
    "adapter": lambda place: [
        "launch/evaluate.py",
        *evaluation_words(f"{place}/scored", adapter=f"{place}/adapter"),
    ],
    "interrupted run": lambda place: [
        "launch/pretrain.py", TOY, *RUN, f"run.folder={place}/interrupted",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launched_verb_ends_with_code_two_and_one_line(name, originals, tmp_path):
    tried = (run_case(name, originals, tmp_path, seed=SEED, number=n) for n in range(100))
    number = next(
        outcome.number
        for outcome in tried
        if outcome.label == REFUSED and KINDS[name].original in outcome.message
    )
    case = make_case(name, originals, tmp_path, seed=SEED, number=number)
    result = run(*LAUNCHED[name](case.place))
    lines = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert (result.returncode, len(lines)) == (2, 1), result.stdout
    assert "Traceback" not in result.stdout
    assert not half_written(case.place)
    assert not [made for made in KINDS[name].results if (case.place / made).exists()]
