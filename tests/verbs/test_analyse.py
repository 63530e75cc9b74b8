"""The verb `analyse`: what it writes, what it needs for it, and what it refuses."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import make_source, write_rows

from mhr_scale.adapters import artefact
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.peft_folders import write_peft_lora
from mhr_scale.config import AlignmentConfig, AnalyseConfig, JsonlTasks, PlainRunConfig, ToyTasks
from mhr_scale.errors import AdapterError, ConfigError, RunError
from mhr_scale.verbs.analyse import analyse

SMALL = AlignmentConfig(tasks=3, rows=2, micro_batch_size=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toy runs of a few steps, by method."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "MHR": (),
        "LoRA": ("adapter.n_skills=1", "adapter.n_splits=1"),
        "private": ("adapter.n_skills=1", "adapter.n_splits=1", "adapter.private=true"),
    }
    return {name: make_source(folder / name, *changes) for name, changes in settings.items()}


def make_config(adapter: Path, folder: Path, **changes: Any) -> AnalyseConfig:
    config = AnalyseConfig(
        adapter=str(adapter), alignment=SMALL, run=PlainRunConfig(folder=str(folder))
    )
    return replace(config, **changes)


def look(adapter: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    analyse(make_config(adapter, folder, **changes))
    found: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    return found


def test_an_analysis_has_every_part_of_its_schema(sources: dict[str, Path], tmp_path: Path) -> None:
    found = look(sources["MHR"], tmp_path / "out")
    facts = {key: found[key] for key in ("schema", "method", "kind", "policy", "granularity")}
    assert facts == {
        "schema": 1,
        "method": "MHR",
        "kind": "lora",
        "policy": "learned",
        "granularity": "linear",
    }
    counts = [found[key] for key in ("n_tasks", "n_groups", "n_splits", "n_skills", "rank")]
    assert counts == [4, 24, 8, 4, 2]
    assert len(found["task_names"]) == 4
    routing, inventory, alignment = (found[k] for k in ("routing", "inventory", "alignment"))
    assert len(routing["groups"]) == 24
    assert sum(routing["usage"]) == pytest.approx(1.0)
    assert sorted(routing["similarity"]["order"]) == [0, 1, 2, 3]
    assert np.shape(routing["similarity"]["matrix"]) == (4, 4)
    assert len(inventory["linears"]) == 24
    assert (len(inventory["norms"]), np.shape(inventory["overlap"])) == (4, (4, 4))
    assert (len(alignment["tasks"]), alignment["rows"]) == (3, 2)
    matrix = np.array(alignment["matrix"])
    assert alignment["mean"] == pytest.approx(matrix[np.triu_indices(3, 1)].mean())
    assert sorted(alignment["order"]) == [0, 1, 2]
    assert [layer["name"] for layer in alignment["layers"]] == [
        f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in range(2)
    ]


def test_numbers_trained_are_those_of_the_few_shot_tables(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    adapter = artefact.load(sources["MHR"])
    inventory = sum(p.numel() for p in adapter.inventory.parameters())
    numbers = look(sources["MHR"], tmp_path / "out", alignment=None)["parameters"]
    assert numbers == {
        "multi_task": inventory,
        "variants": {
            "full": inventory + 24 * 8 * 4,
            "routing": 24 * 8 * 4,
            "average": inventory // 4,
        },
    }


def test_a_lora_has_no_routing_and_no_overlap(sources: dict[str, Path], tmp_path: Path) -> None:
    found = look(sources["LoRA"], tmp_path / "out")
    assert (found["method"], found["routing"]) == ("LoRA", None)
    assert found["parameters"]["variants"]["routing"] is None
    assert found["inventory"]["overlap"] == [[1.0]]
    assert {linear["overlap"] for linear in found["inventory"]["linears"]} == {None}
    assert found["alignment"]["mean"] is not None


def test_the_folder_tells_how_it_was_made(sources: dict[str, Path], tmp_path: Path) -> None:
    look(sources["MHR"], tmp_path / "out")
    assert "adapter:" in (tmp_path / "out" / "config.yaml").read_text()
    (start,) = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (start["placement"], start["backbone"]["name"]) == ("replicated", "builtin:toy")


def test_the_same_analysis_has_the_same_numbers(sources: dict[str, Path], tmp_path: Path) -> None:
    once = look(sources["MHR"], tmp_path / "out")
    assert look(sources["MHR"], tmp_path / "out") == once
    assert look(sources["MHR"], tmp_path / "other") == once


def test_a_table_is_printed(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = look(sources["MHR"], tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("  alignment ") and "over 3 tasks of 2 rows" in line for line in lines
    )
    (block,) = (line.split() for line in lines if line.startswith("decoder.block.1 "))
    assert block[1] == f"{found['alignment']['layers'][3]['mean']:.4f}"


def test_statistics_alone_need_neither_deepspeed_nor_a_backbone(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = sys.modules['transformers'] = None\n"
        "from mhr_scale.config import AnalyseConfig, PlainRunConfig\n"
        "from mhr_scale.verbs.analyse import analyse\n"
        f"analyse(AnalyseConfig(adapter={str(sources['MHR'])!r}, alignment=None, "
        f"run=PlainRunConfig(folder={str(tmp_path / 'out')!r})))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert (found["alignment"], found["n_skills"]) == (None, 4)


def test_an_adapter_without_a_run_gets_statistics_and_the_log_says_why(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mhr_scale"):
        found = look(sources["MHR"] / "adapter", tmp_path / "out")
    assert found["alignment"] is None
    assert "no alignment: " in caplog.text
    assert "give tasks" in caplog.text


def test_an_adapter_without_a_run_is_aligned_on_given_tasks(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    tasks = ToyTasks(suite="toy", n_tasks=4, train_examples=10, validation_examples=2)
    run = PlainRunConfig(folder=str(tmp_path / "out"))
    found = look(sources["MHR"] / "adapter", tmp_path / "out", tasks=tasks, run=run)
    assert found["alignment"] == look(sources["MHR"], tmp_path / "own")["alignment"]


def test_private_inventories_get_statistics_and_the_log_says_why(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mhr_scale"):
        found = look(sources["private"], tmp_path / "out")
    assert found["alignment"] is None
    assert len(found["inventory"]["norms"]) == 4
    assert found["parameters"]["variants"]["full"] is None
    assert "no alignment: every task has an inventory of its own" in caplog.text


def test_a_peft_folder_is_analysed_on_any_tasks(sources: dict[str, Path], tmp_path: Path) -> None:
    mean = average(artefact.load(sources["MHR"]))
    write_peft_lora(mean, tmp_path / "peft", base_model="builtin:toy")
    tasks = JsonlTasks(suite="jsonl", folder=str(write_rows(tmp_path / "rows")))
    found = look(tmp_path / "peft", tmp_path / "out", tasks=tasks, backbone_dtype="float32")
    assert (found["method"], len(found["alignment"]["tasks"])) == ("LoRA", 2)


def test_tasks_without_a_routing_row_are_refused_with_a_suggestion(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    known = artefact.read_card(sources["MHR"]).task_names[0]
    rows = write_rows(tmp_path / "rows")
    (rows / "reverse.mirror.after").rename(rows / f"{known}s")
    tasks = JsonlTasks(suite="jsonl", folder=str(rows))
    with pytest.raises(AdapterError, match="has no routing for 2 of 2 tasks") as error:
        look(sources["MHR"], tmp_path / "out", tasks=tasks)
    assert f"'{known}s'; did you mean '{known}'?" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_task_alone_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    name = artefact.read_card(sources["MHR"]).task_names[0]
    rows = write_rows(tmp_path / "rows")
    (rows / "reverse.mirror.after").rename(tmp_path / "away")
    (rows / "rotate_right.plus4.before").rename(rows / name)
    tasks = JsonlTasks(suite="jsonl", folder=str(rows))
    with pytest.raises(ConfigError, match="alignment compares tasks, and there is only"):
        look(sources["MHR"], tmp_path / "out", tasks=tasks)


def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter here"):
        look(tmp_path / "nothing", tmp_path / "out")


def test_the_folder_of_a_run_is_never_written_over(sources: dict[str, Path]) -> None:
    before = (sources["MHR"] / "config.yaml").read_bytes()
    with pytest.raises(RunError, match=r"use another run\.folder"):
        look(sources["MHR"], sources["MHR"])
    assert (sources["MHR"] / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 1}, "alignment.tasks: 1 make no pair"),
        ({"rows": 0}, "alignment.rows: 0 is not at least 1"),
        ({"micro_batch_size": 0}, "alignment.micro_batch_size: 0 is not at least 1"),
        ({"max_input_tokens": 0}, "alignment.max_input_tokens: 0 is not at least 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlignmentConfig(**changes)


def test_tasks_without_alignment_are_refused() -> None:
    with pytest.raises(ConfigError, match="only alignment reads them"):
        AnalyseConfig(
            adapter="x",
            alignment=None,
            tasks=ToyTasks(suite="toy"),
            run=PlainRunConfig(folder="y"),
        )
