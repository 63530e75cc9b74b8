"""Decoder-only backbones through the launchers: however they are spread, the same bits.

Small random models, the toy suite in bytes. Blocks with norms on queries and keys, before and
behind a sub-layer, and blocks whose attention and feed-forward run side by side.
"""

import json
import shutil
from pathlib import Path

import pytest
from processes import read_metrics, succeed_together
from safetensors.torch import load_file

from mhr_scale.scores.summary import SCORES
from mhr_scale.tasks import toy

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SIZES = (
    "vocab_size: 384, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
    "num_attention_heads: 4"
)
GROUPED = "num_key_value_heads: 2, head_dim: 8"
BACKBONES = {
    "llama": f"{SIZES}, {GROUPED}",
    "qwen3": f"{SIZES}, {GROUPED}",
    "gemma2": f"{SIZES}, {GROUPED}, sliding_window: 8",
    "phi": SIZES,
    "gpt_neox": SIZES,
}
#: Whose runs are also replicated, resumed and recomputed, and adapted to new tasks.
WHOLE = ("llama", "qwen3")
SHARDED, REPLICATED = (
    "run.ds_config=ds_configs/cpu.json",
    "run.ds_config=ds_configs/replicated.json",
)
#: On how many ranks, with which settings.
RUNS = {
    "alone": (0, ["run.ds_config=null"]),
    "alone_recomputing": (0, ["run.ds_config=null", "backbone.recompute=non_reentrant"]),
    "two_replicated": (2, [REPLICATED]),
    "two_sharded": (2, [SHARDED]),
    "two_recomputing": (2, [SHARDED, "backbone.recompute=reentrant"]),
    "resumed": (2, [SHARDED]),
}
IN_ALL = ("alone", "two_sharded")
#: Evaluations of one adapter whose tasks' prompts begin with an instruction.
SCORED = {"padded": (0, "null", "false"), "two_sharded": (2, "ds_configs/cpu.json", "true")}
#: Runs of one family alone: rows padded, for these are packed by default, under both optimizers.
PADDED = {
    "padded": ["batch.packing=false"],
    "adafactor": ["optim.name=adafactor"],
    "adafactor_padded": ["optim.name=adafactor", "batch.packing=false"],
}
WAVES = {"alone": (0, "null", 1), "two_sharded": (2, "ds_configs/cpu.json", 4)}


def training(family: str, folder: Path, changes: list[str]) -> tuple[str, ...]:
    return (
        "launch/pretrain.py",
        "launch/recipes/toy.yaml",
        f"backbone={{config: {{model_type: {family}, {BACKBONES[family]}}}, dtype: float32}}",
        "adapter={layout: full, rank: 1, n_skills: 4, n_splits: 8}",
        "tasks={suite: toy, instruction: none, n_tasks: 8, train_examples: 20, "
        "validation_examples: 1}",
        "batch={batch_size: 8, micro_batch_size: 4, max_input_tokens: 32, max_target_tokens: 32}",
        "schedule={steps: 4, decay: linear}",
        "run.save_every=2",
        "run.log_every=1",
        f"run.folder={folder}",
        *changes,
    )


def adapting(source: Path, folder: Path, placement: str, size: int) -> tuple[str, ...]:
    return (
        "launch/adapt.py",
        "launch/recipes/toy_adapt.yaml",
        f"variants={{MHR: {{adapter: {source}}}, "
        f"MHR-z: {{adapter: {source}, kind: routing}}, "
        f"MHR-mu: {{adapter: {source}, kind: average}}, "
        "IA3: {fresh: {kind: ia3, layout: light, n_skills: 1}, lr: 0.01}}",
        f"tasks.tasks=[{', '.join(toy.split(0)[0][8:])}]",
        "shots={seeds: [0], count: 8}",
        "protocol={steps: 6, batch_size: 4, loss: t_few, max_input_tokens: 32}",
        "selection={on: test, every_epochs: 2}",
        "scoring={metric: accuracy, examples: 4}",
        "run.log_every=1",
        f"waves.size={size}",
        f"run.ds_config={placement}",
        f"run.folder={folder}",
    )


def evaluating(source: Path, folder: Path, placement: str, packing: str) -> tuple[str, ...]:
    return (
        "launch/evaluate.py",
        "launch/recipes/toy_evaluate.yaml",
        f"adapter={source}",
        "tasks={suite: toy, instruction: full, n_tasks: 8, train_examples: 20, "
        "validation_examples: 6}",
        f"scoring.packing={packing}",
        "scoring.max_tokens=500",
        f"run.ds_config={placement}",
        f"run.folder={folder}",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    for ranks in (0, 2):
        commands = []
        for family in BACKBONES:
            for name, (on, changes) in RUNS.items():
                if on != ranks or not (family in WHOLE or name in IN_ALL):
                    continue
                at = folder / family / name
                if name == "resumed":
                    shutil.copytree(folder / family / "alone", at)
                    shutil.rmtree(at / "steps" / "000004")
                commands.append(training(family, at, changes))
        for name, changes in PADDED.items() if ranks == 0 else ():
            changes = ["run.ds_config=null", *changes]
            commands.append(training("llama", folder / "llama" / name, changes))
        for family in WHOLE:
            source = folder / family / "alone"
            for name, (on, placement, size) in WAVES.items():
                if on == ranks:
                    at = folder / "waves" / family / name
                    commands.append(adapting(source, at, placement, size))
        for name, (on, placement, packing) in SCORED.items():
            if on == ranks:
                at = folder / "scored" / name
                commands.append(evaluating(folder / "gemma2" / "alone", at, placement, packing))
        succeed_together(commands, folder, ranks=ranks)
    return folder


def losses(run: Path) -> list[float]:
    found = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert len(found) == 4
    return found


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("family", BACKBONES)
def test_placements_train_the_same_adapter(folder: Path, family: str) -> None:
    alone = folder / family / "alone"
    for name in ("two_sharded", "two_replicated") if family in WHOLE else ("two_sharded",):
        run = folder / family / name
        assert adapter_bytes(run) == adapter_bytes(alone), name
        assert losses(run) == losses(alone), name


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("name", ["resumed", "alone_recomputing", "two_recomputing"])
def test_resuming_and_recomputing_change_nothing(folder: Path, family: str, name: str) -> None:
    assert adapter_bytes(folder / family / name) == adapter_bytes(folder / family / "alone")


@pytest.mark.parametrize(
    ("packed", "padded"), [("alone", "padded"), ("adafactor", "adafactor_padded")]
)
def test_packed_rows_train_the_adapter_of_padded_ones(
    folder: Path, packed: str, padded: str
) -> None:
    runs = folder / "llama" / packed, folder / "llama" / padded
    ours, theirs = map(losses, runs)
    assert ours == pytest.approx(theirs, rel=1e-6)
    found, expected = (
        {line["step"]: line["validation_loss"] for line in read_metrics(run) if "loss" not in line}
        for run in runs
    )
    assert found == pytest.approx(expected, rel=1e-6)
    one, other = (load_file(run / "adapter" / "adapter.safetensors") for run in runs)
    apart = sum(float((one[key] - other[key]).double().square().sum()) for key in one)
    whole = sum(float(other[key].double().square().sum()) for key in other)
    assert 0.0 < apart**0.5 <= 1e-6 * whole**0.5


def test_no_pass_of_packed_rows_has_padding(folder: Path) -> None:
    for metrics in (folder / "llama").glob("*/metrics.jsonl"):
        lines = [line for line in read_metrics(metrics.parent) if "loss" in line]
        is_padded = metrics.parent.name.endswith("padded")
        assert all((line["padding_share"] > 0.1) == is_padded for line in lines)
        assert is_padded or not any(line["padding_share"] for line in lines)


def test_training_moved_every_tensor(folder: Path) -> None:
    for family in BACKBONES:
        tensors = load_file(folder / family / "alone" / "adapter" / "adapter.safetensors")
        assert all(bool(tensor.any()) for tensor in tensors.values())


@pytest.mark.parametrize("family", WHOLE)
def test_jobs_in_waves_equal_separate_runs(folder: Path, family: str) -> None:
    runs = [folder / "waves" / family / name for name in WAVES]
    jobs = sorted(path.parent.relative_to(runs[0]) for path in runs[0].rglob("result.json"))
    assert len(jobs) == 2 * 4
    for job in jobs:
        one, other = (load_file(run / job / "adapter" / "adapter.safetensors") for run in runs)
        assert all(one[key].equal(other[key]) for key in one.keys() | other.keys()), job
        assert read_metrics(runs[0] / job) == read_metrics(runs[1] / job), job


def test_sharded_ranks_that_share_prompts_score_as_one_process_of_padded_rows(folder: Path) -> None:
    padded, shared = (
        [json.loads(line) for line in (folder / "scored" / name / SCORES).read_text().splitlines()]
        for name in SCORED
    )
    assert [line["id"] for line in shared] == [line["id"] for line in padded]
    assert len(shared) == 8 * 6
    for one, other in zip(padded, shared, strict=True):
        assert other["choice_scores"] == pytest.approx(one["choice_scores"], rel=1e-5)
