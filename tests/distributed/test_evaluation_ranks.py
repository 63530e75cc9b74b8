"""An evaluation on two sharded ranks gives the scores of one process."""

import json
from pathlib import Path

import pytest
from processes import succeed_together

pytestmark = [pytest.mark.dist, pytest.mark.slow]

METRICS = "accuracy", "exact_match"
#: What an evaluation of all averages leaves.
AVERAGES = "000000", "000002", "bare"
#: 7 examples of each of 3 tasks in small batches: the shares of two ranks differ.
SETTINGS = (
    "tasks={suite: toy, n_tasks: 3, train_examples: 10, validation_examples: 7}",
    "scoring.max_tokens=100",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    trained = (
        "launch/pretrain.py",
        "launch/recipes/toy.yaml",
        f"run.folder={folder / 'toy'}",
        "tasks.n_tasks=3",
        "tasks.train_examples=10",
        "tasks.validation_examples=7",
        "schedule.steps=3",
        "batch.batch_size=8",
        "batch.micro_batch_size=4",
    )

    def evaluated(name: str, placement: str, metric: str) -> tuple[str, ...]:
        return (
            "launch/evaluate.py",
            "launch/recipes/toy_evaluate.yaml",
            f"adapter={folder / 'toy'}",
            f"run.folder={folder / f'{name}_{metric}'}",
            f"run.ds_config={placement}",
            f"scoring.metric={metric}",
            "scoring.max_new_tokens=6",
            *SETTINGS,
        )

    averaged = (
        "launch/average.py",
        "launch/recipes/toy_average.yaml",
        f"source={folder / 'toy'}",
        f"run.folder={folder / 'averages'}",
        "steps=[0, 2]",
    )

    def every_average(name: str, placement: str) -> tuple[str, ...]:
        changes = (f"adapter={folder / 'averages'}", f"run.folder={folder / f'{name}_averages'}")
        return (*evaluated(name, placement, "accuracy"), *changes, "extra_steps=all")

    library = "adapter={layout: attention, rank: 2, n_skills: 1, private: true}"
    private = (*trained, f"run.folder={folder / 'private'}", library)

    def arrow(name: str, placement: str, metric: str) -> tuple[str, ...]:
        changes = (
            f"adapter={folder / 'private'}",
            f"run.folder={folder / f'{name}_arrow_{metric}'}",
        )
        return (*evaluated(name, placement, metric), *changes, "routing=arrow", "arrow.top_k=2")

    one = [evaluated("one", "null", metric) for metric in METRICS]
    two = [evaluated("two", "ds_configs/cpu.json", metric) for metric in METRICS]
    one += [averaged, every_average("one", "null")]
    two.append(every_average("two", "ds_configs/cpu.json"))
    one += [private, *(arrow("one", "null", metric) for metric in METRICS)]
    two += [arrow("two", "ds_configs/cpu.json", metric) for metric in METRICS]
    succeed_together([trained, *one], folder)
    succeed_together(two, folder, ranks=2)
    return folder / "one", folder / "two"


def scores(folder: Path, metric: str) -> dict[str, dict]:
    path = folder.parent / f"{folder.name}_{metric}" / "scores.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) == 21
    return {line["id"]: line for line in lines}


@pytest.mark.parametrize("metric", METRICS)
def test_two_ranks_write_the_lines_of_one_in_its_order(
    folders: tuple[Path, Path], metric: str
) -> None:
    one, two = (scores(folder, metric) for folder in folders)
    assert list(two) == list(one)


@pytest.mark.parametrize(
    "asked", ["accuracy", "arrow_accuracy", *(f"averages/{k}" for k in AVERAGES)]
)
def test_choice_scores_are_equal(folders: tuple[Path, Path], asked: str) -> None:
    one, two = (scores(folder, asked) for folder in folders)
    for identity, line in one.items():
        assert two[identity]["choice_scores"] == pytest.approx(line["choice_scores"], rel=1e-5)


@pytest.mark.parametrize("asked", ["exact_match", "arrow_exact_match"])
def test_generated_answers_are_equal(folders: tuple[Path, Path], asked: str) -> None:
    one, two = (scores(folder, asked) for folder in folders)
    assert {i: line["prediction"] for i, line in two.items()} == {
        i: line["prediction"] for i, line in one.items()
    }
