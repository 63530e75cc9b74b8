"""Few-shot jobs through the launchers: however they are batched and spread, the same bits."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import read_metrics, run, succeed, succeed_together
from safetensors.torch import load_file
from tracked import expected, tensorboard_steps

from mhr_scale.tasks import toy

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TASKS = toy.split(0)[0][5:]
VARIANTS = "MHR", "MHR-z", "MHR-mu", "MHR-mu-all", "LoRA", "IA3"
#: Random weights, four layers in all; toy tasks in bytes: inputs and answers of many lengths.
BACKBONE = (
    "backbone={config: {d_model: 32, d_ff: 64, d_kv: 16, num_heads: 2, num_layers: 2, "
    "vocab_size: 384, feed_forward_proj: gated-gelu, tie_word_embeddings: false}, dtype: float32}"
)


#: On how many ranks, in which placement, how many jobs at a time.
RUNS = {
    "alone": (0, "null", 1),
    "waves_of_5": (0, "null", 5),
    "two_replicated_ranks": (2, "null", 2),
    "two_sharded_ranks": (2, "ds_configs/cpu.json", 4),
}


#: Those whose operations run in deterministic forms: the same numbers, on a CPU.
DETERMINISTIC = ("waves_of_5", "two_sharded_ranks")


def train_source(folder: Path) -> tuple[str, ...]:
    """The command that trains an inventory for some steps."""
    return (
        "launch/pretrain.py",
        "launch/recipes/toy.yaml",
        BACKBONE,
        f"run.folder={folder}",
        "tasks.n_tasks=8",
        "tasks.train_examples=20",
        "tasks.validation_examples=0",
        "schedule.steps=10",
        "batch.batch_size=16",
        "batch.micro_batch_size=16",
    )


def settings(source: Path, folder: Path) -> list[str]:
    variants = (
        f"variants={{MHR: {{adapter: {source}}}, "
        f"MHR-z: {{adapter: {source}, kind: routing, steps: 24}}, "
        f"MHR-mu: {{adapter: {source}, kind: average, steps: 35}}, "
        f"MHR-mu-all: {{adapter: {source}, kind: average, trainable: inventory, steps: 24}}, "
        "LoRA: {fresh: {n_skills: 1, rank: 1}, steps: 24}, "
        "IA3: {fresh: {kind: ia3, layout: light, n_skills: 1}, lr: 0.01, steps: 24}}"
    )
    return [
        "launch/recipes/toy_adapt.yaml",
        variants,
        f"tasks.tasks=[{', '.join(TASKS)}]",
        "shots={seeds: [0], count: 12}",
        "protocol={steps: 50, batch_size: 4, loss: t_few, max_input_tokens: 32}",
        "optim={name: adafactor, lr: 3.0e-3, scale_parameter: true}",
        "selection={on: test, every_epochs: 2, patience: 6}",
        "scoring={metric: accuracy, examples: 4}",
        f"run.folder={folder}",
        "run.log_every=1",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, and what the launches on so many ranks printed: `printed_2.txt`."""
    folder = tmp_path_factory.mktemp("waves")
    source = folder / "source"
    commands: dict[int, list[Sequence[str]]] = {0: [train_source(source)], 2: []}
    for name, (ranks, placement, size) in RUNS.items():
        options = (
            f"waves.size={size}",
            f"run.ds_config={placement}",
            f"run.deterministic={str(name in DETERMINISTIC).lower()}",
            f"run.trackers={'[tensorboard]' if ranks else '[]'}",
        )
        words = settings(source, folder / name)
        commands[ranks].append(("launch/adapt.py", *words, *options))
    for ranks, together in commands.items():
        printed = succeed_together(together, folder, ranks=ranks)
        (folder / f"printed_{ranks}.txt").write_text(printed)
    return folder


def jobs(folder: Path) -> dict[str, Path]:
    found = {str(p.parent.relative_to(folder)): p.parent for p in folder.rglob("result.json")}
    assert {path.name for path in found.values()} == set(VARIANTS)
    assert len(found) == len(TASKS) * len(VARIANTS)
    return found


def scores(job: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (job / "scores.jsonl").read_text().splitlines()]
    return {line["id"]: line["choice_scores"] for line in lines}


def check_same(folder: Path, alone: Path) -> None:
    """Adapters, losses and evaluations of all jobs agree, bit for bit.

    Choice scores are sums over batches that jobs share, and agree up to rounding.
    """
    for name, job in jobs(folder).items():
        other = alone / name
        mine, theirs = (load_file(at / "adapter" / "adapter.safetensors") for at in (job, other))
        assert all(mine[key].equal(theirs[key]) for key in mine.keys() | theirs.keys()), name
        assert read_metrics(job) == read_metrics(other), name
        assert (job / "result.json").read_text() == (other / "result.json").read_text(), name
        expected = scores(other)
        assert scores(job).keys() == expected.keys()
        for identity, found in scores(job).items():
            assert found == pytest.approx(expected[identity], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "alone"])
def test_jobs_in_waves_equal_separate_runs(folder: Path, name: str) -> None:
    check_same(folder / name, folder / "alone")


@pytest.mark.parametrize("name", [name for name, (ranks, _, _) in RUNS.items() if ranks])
def test_of_several_ranks_one_tracks_a_job(folder: Path, name: str) -> None:
    for job in jobs(folder / name).values():
        assert len(list((job / "tensorboard").iterdir())) == 1
        assert tensorboard_steps(job) == expected(job)


@pytest.mark.parametrize("ranks", [0, 2])
def test_every_variant_is_in_the_table(folder: Path, ranks: int) -> None:
    printed = (folder / f"printed_{ranks}.txt").read_text()
    n_runs = sum(of == ranks for of, _, _ in RUNS.values())
    for name in VARIANTS:
        assert len(re.findall(rf"^ *{name} ", printed, flags=re.MULTILINE)) == n_runs


def test_jobs_of_one_variant_stop_at_steps_of_their_own(folder: Path) -> None:
    found = [
        json.loads((job / "result.json").read_text()) for job in jobs(folder / "alone").values()
    ]
    steps = {result["steps"] for result in found if result["variant"] == "MHR"}
    assert len(steps) > 1
    assert max(steps) > 36


def test_an_interrupted_run_goes_on_with_other_ranks_and_waves(
    folder: Path, tmp_path: Path
) -> None:
    words = settings(folder / "source", tmp_path)
    options = ["waves.save_every=7", "run.ds_config=ds_configs/cpu.json", "waves.size=5"]
    programme = "tests/distributed/programs/adapt_killed.py"
    result = run(programme, "23", *words, *options, ranks=2)
    assert result.returncode != 0
    assert any(tmp_path.rglob("steps/*/DONE"))
    succeed("launch/adapt.py", *words, "waves.size=2", "waves.save_every=7")
    check_same(tmp_path, folder / "alone")
