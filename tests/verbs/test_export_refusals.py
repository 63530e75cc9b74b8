"""The verb `export` on what it cannot export: one line, and nothing is left."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from toy_exports import TASKS, files, make, run_export, save_run, save_runs, toy_t5

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, find_sites, peft_folders
from mhr_scale.config import ExportConfig
from mhr_scale.errors import AdapterError, BackboneError, ConfigError, RunError
from mhr_scale.verbs.export import export

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",
    "ignore:.torch.jit.script_method. is deprecated",
)
TASK = TASKS[1]
SOUP = (TASKS[0], TASKS[2])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ("MHR", "LoRA", "IA3", "private", "shared routing", "uniform")
    return save_runs(tmp_path_factory.mktemp("runs"), *kinds)


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"what": "task"}, "^task: .*what: task"),
        ({"task": TASK}, "^task: .*what: task"),
        ({"what": "soup"}, "^tasks: .*what: soup"),
        ({"tasks": SOUP}, "^tasks: .*what: soup"),
        ({"what": "soup", "tasks": (TASK, TASK)}, rf"^tasks: \['{TASK}', '{TASK}'\] "),
        ({"what": "average", "format": "peft_poly"}, "^format: peft_poly .*what: average;"),
        ({"what": "all_tasks", "format": "merged"}, "^format: merged .*what: all_tasks;"),
        ({"dtype": "bfloat16"}, "^dtype: .*float32"),
        ({"max_shard_bytes": 0}, "^max_shard_bytes: 0 "),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExportConfig(adapter="runs/x", folder="out", **settings)


@pytest.mark.parametrize(
    ("run", "settings", "words"),
    [
        ("MHR", {"what": "task", "task": "sort it"}, "/MHR: task 'sort it' .*'sort/it'"),
        ("private", {"what": "soup", "tasks": ("sort it",)}, "/private: task 'sort it' .*'sort/it"),
        ("MHR", {"what": "soup", "tasks": SOUP}, r"/MHR: .*private.* 3 skill\(s\)"),
        ("MHR", {"what": "whole"}, r"/MHR: MHR of 3 skill\(s\) .*what: average"),
        (
            "MHR",
            {"what": "whole", "format": "merged"},
            r"/MHR: MHR of 3 skill\(s\) .*what: average",
        ),
        ("uniform", {"what": "all_tasks"}, "/uniform: .*'uniform'"),
        ("LoRA", {"what": "task", "task": TASK}, f"/LoRA: .*'{TASK}'"),
        ("shared routing", {"format": "peft_poly"}, "/out as PEFT Poly: .*block"),
    ],
)
def test_what_the_adapter_does_not_have_is_refused(
    run: str, settings: dict, words: str, runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        run_export(str(runs / run), tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == []


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    config = {**sizes, "vocab_size": 384, "feed_forward_proj": "gated-gelu"}
    run = save_run(tmp_path / "run", make("LoRA"), backbone={"config": config})
    with pytest.raises(AdapterError, match=r"/run: .*SelfAttention\.q .*\(64, 64\).*\(32, 32\)"):
        run_export(run, tmp_path / "out")
    assert files(tmp_path) == ["run"]


def test_a_backbone_that_is_not_there_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"/LoRA: .*'/no/such/folder'"):
        run_export(str(runs / "LoRA"), tmp_path / "out", backbone_moved_to="/no/such/folder")


def test_a_path_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^{tmp_path}: "):
        run_export(str(tmp_path), tmp_path / "out")


def test_a_folder_that_is_not_empty_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(RunError, match=r"/out is not empty"):
        run_export(str(runs / "LoRA"), tmp_path / "out")
    assert (files(tmp_path), files(tmp_path / "out")) == (["out"], ["mine"])


@pytest.mark.parametrize(
    ("name", "words"), [("f", "/f is a file"), ("f/out", "cannot write in .*/f")]
)
def test_a_file_in_the_way_is_refused(name: str, words: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(RunError, match=words):
        run_export(str(runs / "LoRA"), tmp_path / name)


def test_a_job_that_trained_the_backbone_is_no_peft_folder(tmp_path: Path) -> None:
    run = save_run(tmp_path / "job", make("LoRA"), origin={"backbone": "backbone.safetensors"})
    for form in ("peft", "native"):
        with pytest.raises(AdapterError, match=r"/job: .*format: merged"):
            run_export(run, tmp_path / "out", format=form)


# --- a failed check


def spoil(file: Path) -> None:
    """Change the last tensor a little."""
    tensors = load_file(file)
    name = max(name for name in tensors if "logits" not in name)
    tensors[name] = tensors[name] + 0.03
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("run", "settings", "writer"),
    [
        ("MHR", {}, "write_peft_lora"),
        ("IA3", {}, "write_peft_ia3"),
        ("MHR", {"format": "peft_poly"}, "write_peft_poly"),
        ("MHR", {"what": "all_tasks"}, "write_peft_lora"),
    ],
)
def test_a_damaged_peft_folder_is_noticed_and_nothing_is_left(
    run: str,
    settings: dict,
    writer: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = getattr(peft_folders, writer)

    def write_and_spoil(adapter: Adapter, folder: Path, **options: Any) -> None:
        write(adapter, folder, **options)
        spoil(folder / peft_folders.TENSORS)

    monkeypatch.setattr(peft_folders, writer, write_and_spoil)
    with pytest.raises(AdapterError, match=r"out: not exported: the logits of what stock"):
        run_export(str(runs / run), tmp_path / "out", **settings)
    assert files(tmp_path) == []


def test_a_folder_that_peft_cannot_load_is_noticed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = peft_folders.write_peft_lora

    def write_half(adapter: Adapter, folder: Path, **options: Any) -> None:
        write(adapter, folder, **options)
        os.truncate(folder / peft_folders.TENSORS, 100)

    monkeypatch.setattr(peft_folders, "write_peft_lora", write_half)
    with pytest.raises(AdapterError, match="not exported: stock PEFT does not load it"):
        run_export(str(runs / "LoRA"), tmp_path / "out")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("run", "form", "module", "writer"),
    [("MHR", "native", artefact, "save"), ("LoRA", "peft", peft_folders, "write_peft_lora")],
    ids=["native", "peft"],
)
def test_one_wrong_bit_is_noticed(
    run: str,
    form: Any,
    module: Any,
    writer: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = getattr(module, writer)

    def write_another(adapter: Adapter, folder: Path, **options: Any) -> Path:
        tensor = next(iter(artefact.named_tensors(adapter).values()))
        before = tensor.clone()
        tensor.view(torch.int32).flatten()[0] ^= 1
        write(adapter, folder, **options)
        tensor.copy_(before)
        return folder

    monkeypatch.setattr(module, writer, write_another)
    with pytest.raises(AdapterError, match=r"1 tensor\(s\) of what was written differ"):
        run_export(str(runs / run), tmp_path / "out", format=form)
    assert files(tmp_path) == []


def test_a_full_disk_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_folders, "write_peft_lora", write)
    with pytest.raises(RunError, match=r"cannot write to .*out \(.*No space left"):
        run_export(str(runs / "LoRA"), tmp_path / "out")
    assert files(tmp_path) == []


def test_an_interruption_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftModel, "from_pretrained", load)
    with pytest.raises(KeyboardInterrupt):
        export(ExportConfig(adapter=str(runs / "LoRA"), folder=str(tmp_path / "out")))
    assert files(tmp_path) == []


def test_a_disk_that_fills_up_is_told_with_the_file(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mhr_scale.backbone.shards.os.fsync", full)
    with pytest.raises(RunError) as caught:
        run_export(str(runs / "LoRA"), tmp_path / "out", format="merged")
    assert str(caught.value).startswith(
        f"folder: cannot write to {tmp_path / 'out'} ([Errno 28] No space left on device: "
    )
    assert "/model.safetensors'); make room, or name a folder on another" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- how far logits may differ


def strong(strength: float, *, alpha: float = 16.0) -> Adapter:
    """A LoRA of rank 16 whose updates are large: roundings of its numbers show in the logits."""
    config = AdapterConfig(layout="full", rank=16, n_skills=1, alpha=alpha)
    adapter = Adapter(config, find_sites(toy_t5(), config.layout), task_names=["a"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.named_parameters():
        std = strength if ".B_" in name else 0.05
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("form", ["merged", "peft", "native"])
def test_a_strong_adapter_may_differ_by_what_its_last_bits_do(form: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", strong(1.0))
    run_export(run, tmp_path / "out", format=form, dtype="float32" if form == "merged" else None)
    assert (tmp_path / "out").is_dir()


def test_a_strong_adapter_written_wrongly_is_still_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", strong(1.0))
    write = peft_folders.write_peft_lora

    def write_wrongly(adapter: Adapter, folder: Path, *, base_model: str | None) -> Path:
        return write(strong(1.0, alpha=15.9), folder, base_model=base_model)

    monkeypatch.setattr(peft_folders, "write_peft_lora", write_wrongly)
    with pytest.raises(AdapterError, match="the logits of what stock PEFT loads differ"):
        run_export(run, tmp_path / "out")


def test_an_adapter_that_no_comparison_can_judge_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhr_scale.exchange.reloading.LOUDEST", 1e-5)
    run = save_run(tmp_path / "run", strong(1.0))
    with pytest.raises(AdapterError, match=r"last bits of the adapter's .*set check: false"):
        run_export(run, tmp_path / "out", format="merged", dtype="float32")


def test_the_last_words_say_of_how_many_tasks_logits_were_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"task_{number}" for number in range(10)]
    run = save_run(tmp_path / "run", make("Poly", tasks=names))
    run_export(run, tmp_path / "out", what="all_tasks")
    said = capsys.readouterr().out
    assert "8 of 10 tasks were compared: their logits are the original's" in said
