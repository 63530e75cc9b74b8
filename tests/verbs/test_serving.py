"""`export format: serving`: many LoRAs of one backbone in one folder, as servers take them."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hub_server
import peft
import pytest
import torch
from causal_folders import write_causal
from safetensors.torch import load_file
from toy_exports import files, run_export, save_run
from toy_exports import make as make_toy
from transformers import AutoModelForCausalLM

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, attach, detach, find_sites
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.padding import pad
from mhr_scale.config import ExportConfig
from mhr_scale.errors import AdapterError, ConfigError, RunError
from mhr_scale.exchange.serving import ends_of, served_rank
from mhr_scale.jobs.job import Job, write_result
from mhr_scale.run.files import hash_file

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
TASKS = ("sort/it", "a=b, c", "copy")
KINDS = {
    "MHR": AdapterConfig(layout="attention", rank=2, n_skills=3, n_splits=2, alpha=3.0),
    "middle": AdapterConfig(layout="full", rank=1, n_skills=2, n_splits=4, blocks="1"),
    "LoRA": AdapterConfig(layout="light", rank=11, n_skills=1, alpha=2.0),
    "uniform": AdapterConfig(layout="attention", rank=1, n_skills=2, policy="uniform"),
    "IA3": AdapterConfig(kind="ia3", layout="attention", n_skills=1),
    "wide": AdapterConfig(layout="attention", rank=513, n_skills=1),
}


def make(model: Any, kind: str, tasks: tuple[str, ...] = TASKS, seed: int = 0) -> Adapter:
    """An adapter that moves the logits a good deal."""
    config = KINDS[kind]
    sites = find_sites(model, config.layout, config.blocks)
    adapter = Adapter(config, sites, task_names=tasks)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        scale = 2.0 if name == "routing_logits" else 0.15
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return adapter


class Runs:
    """A small model, adapters over it as runs, and a run of few-shot jobs."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        self.folder = folder
        self.base = write_causal(folder / "base", family)
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        self.few_shot = folder / "few_shot"

    def save(self, folder: Path, adapter: Adapter, **facts: Any) -> str:
        backbone = {"name": str(self.base), "dtype": "float32"}
        artefact.save(adapter, folder / "adapter", **{"backbone": backbone, **facts})
        return str(folder)

    def run(self, kind: str, **facts: Any) -> str:
        return self.save(self.folder / kind, make(self.model, kind), **facts)

    def job(self, seed: int, kind: str, *, run: Path | None = None, done: bool = True) -> Adapter:
        """A job whose LoRAs are equal for all seeds."""
        run, job = run or self.few_shot, Job(task="new one", seed=seed, variant=kind)
        adapter = make(self.model, kind, tasks=(job.task,), seed=5)
        self.save(job.folder(run), adapter, origin={"job": job.name})
        numbers = {"score": 1.0, "source_numbers": 1, "trained_numbers": 1}
        if done:
            words = {"kind": "full", "adapter": None, "metric": "exact_match"}
            write_result(job, run, {**words, **numbers})
        return adapter

    def logits(self, adapter: Adapter, task: str) -> torch.Tensor:
        """What our own adapter gives the rows under one task's routing."""
        config = adapter.config
        copied = attach(self.model, config, tasks=adapter.task_names)
        artefact.load_tensors(copied, artefact.named_tensors(adapter), place="the other adapter")
        number = adapter.task_names.index(task)
        with torch.no_grad(), copied.slots((number,) * len(ROWS)):
            logits = self.model(ROWS).logits
        detach(self.model)
        return logits


ROWS = torch.randint(3, 90, (7, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    for kind in KINDS:
        runs.run(kind)
    for seed in (0, 1):
        runs.job(seed, "LoRA")
    runs.job(0, "MHR")
    runs.job(2, "LoRA", done=False)
    return runs


@pytest.fixture(scope="module")
def served(runs: Runs) -> Path:
    """Tasks of two routed adapters, an average and three jobs, of which two are equal."""
    also = (str(runs.folder / "uniform"), str(runs.few_shot))
    return run_export(
        str(runs.folder / "MHR"), runs.folder / "served", format="serving", also=also, max_loras=4
    )


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def stock(runs: Runs, folder: Path) -> tuple[Any, list[str]]:
    """Stock PEFT with every LoRA of the folder, called by its place in the manifest."""
    base = AutoModelForCausalLM.from_pretrained(runs.base, dtype=torch.float32)
    model: Any = None
    names = []
    for number, lora in enumerate(read(folder)["loras"]):
        names.append(f"n{number}")
        if model is None:
            model = peft.PeftModel.from_pretrained(base, folder / lora["folder"], names[-1])
        else:
            model.load_adapter(folder / lora["folder"], names[-1])
    return model.eval(), names


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * largest


# --- what is computed


def test_every_row_of_a_mixed_batch_is_its_tasks_routed_adapter(runs: Runs, served: Path) -> None:
    model, names = stock(runs, served)
    mhr, mean = make(runs.model, "MHR"), average(make(runs.model, "uniform"))
    jobs = {kind: make(runs.model, kind, ("new one",), 5) for kind in ("LoRA", "MHR")}
    originals = {
        **{task: (mhr, task) for task in TASKS},
        "uniform": (mean, "average"),
        **{f"new one/{n}/LoRA": (jobs["LoRA"], "new one") for n in (0, 1)},
        "new one/0/MHR": (jobs["MHR"], "new one"),
    }
    known = [lora["name"] for lora in read(served)["loras"]]
    assert known == [*TASKS, "uniform", "new one/0/LoRA", "new one/0/MHR", "new one/1/LoRA"]
    with torch.no_grad():
        found, bare = model(ROWS, adapter_names=names).logits, runs.model(ROWS).logits
    for row, name in enumerate(known):
        expected = runs.logits(*originals[name])[row]
        assert_close(found[row], expected)
        assert (expected - bare[row]).abs().max() > 0.05 * bare.abs().max()


def test_a_mixed_batch_generates_what_each_lora_does_alone(runs: Runs, served: Path) -> None:
    model, names = stock(runs, served)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        mixed = model.generate(ROWS, adapter_names=names, **settings)
        for row, name in enumerate(names):
            model.set_adapter(name)
            assert torch.equal(model.generate(ROWS[row : row + 1], **settings)[0], mixed[row])


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral"])
def test_fused_transposed_and_expert_blocks_are_served_too(family: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, family)
    out = run_export(runs.run("MHR"), tmp_path / "out", format="serving")
    fused = {"phi3": ["o_proj", "qkv_proj"], "gpt2": ["attn.c_attn", "attn.c_proj"]}
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert read(out)["target_modules"] == fused.get(family, attention)


# --- what is written


def test_ranks_are_those_that_servers_take_and_scales_stay(served: Path) -> None:
    kinds = {"new one/0/LoRA": (11, 16, 2.0), "uniform": (1, 8, 1.0)}
    for lora in read(served)["loras"]:
        trained, rank, alpha = kinds.get(lora["name"], (2, 8, 3.0))
        if lora["name"] == "new one/1/LoRA":
            trained, rank, alpha = kinds["new one/0/LoRA"]
        config = json.loads((served / lora["folder"] / "adapter_config.json").read_text())
        assert (lora["trained_rank"], lora["rank"], config["r"]) == (trained, rank, rank)
        assert config["lora_alpha"] / rank == pytest.approx(alpha / trained, rel=1e-12)
        tensors = load_file(served / lora["folder"] / "adapter_model.safetensors")
        assert {min(tensor.shape) for tensor in tensors.values()} == {rank}
        assert hash_file(served / lora["folder"] / "adapter_model.safetensors") == lora["sha256"]
    assert [served_rank(rank) for rank in (1, 8, 9, 129, 257, 320, 321)] == [
        *(8, 8, 16, 256, 320, 320, 512)
    ]


def test_equal_loras_are_one_folder_with_two_names(served: Path) -> None:
    loras = {lora["name"]: lora for lora in read(served)["loras"]}
    twin, other = loras["new one/0/LoRA"], loras["new one/1/LoRA"]
    assert (twin["folder"], twin["sha256"]) == (other["folder"], other["sha256"])
    assert twin["job"] == {"task": "new one", "seed": 0, "variant": "LoRA"}
    assert files(served / "loras") == sorted({Path(one["folder"]).name for one in loras.values()})
    assert len(files(served / "loras")) == len(loras) - 1


def test_a_lora_of_some_blocks_is_on_its_linears_in_all(runs: Runs, tmp_path: Path) -> None:
    out = run_export(str(runs.folder / "middle"), tmp_path / "out", format="serving")
    (task, *_) = read(out)["loras"]
    config = json.loads((out / task["folder"] / "adapter_config.json").read_text())
    ends = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == read(out)["target_modules"] == ends
    tensors = load_file(out / task["folder"] / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(ends)
    for name, tensor in tensors.items():
        assert bool(tensor.any()) == (".layers.1." in name)


def test_ends_of_names_name_no_other_linear() -> None:
    model = ["h.0", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj"]
    assert ends_of(["h.0.attn.c_attn"], model) == ["c_attn"]
    assert ends_of(["h.0.attn.c_attn", "h.0.attn.c_proj"], model) == ["attn.c_attn", "attn.c_proj"]
    assert ends_of(["h.0.mlp.c_proj", "h.1.mlp.c_proj"], model) == ["mlp.c_proj"]
    assert ends_of(["h.0.mlp.c_proj"], model) == ["0.mlp.c_proj"]
    assert ends_of(["mlp.c_proj"], ["mlp.c_proj", "a.mlp.c_proj"]) == ["mlp.c_proj"]


def test_the_script_starts_vllm_with_every_lora_from_any_folder(
    served: Path, tmp_path: Path
) -> None:
    stub = tmp_path / "vllm"
    stub.write_text('#!/bin/sh\npwd\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(served / "vllm.sh"), "--port", "8001"]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    here, *words = done.stdout.splitlines()
    manifest = read(served)
    assert Path(here).samefile(served)
    number = words.index("--lora-modules")
    assert words[:number] == [
        *("serve", manifest["base_model"], "--port", "8001", "--enable-lora"),
        *("--max-lora-rank", "16", "--max-loras", "4", "--max-cpu-loras", "7"),
    ]
    known = {}
    for word in words[number + 1 :]:
        if "=" in word and "," not in word:  # as vLLM reads it
            name, folder = word.split("=")
        else:
            given = json.loads(word)
            name, folder = given["name"], given["path"]
        known[name] = folder
    assert known == {lora["name"]: lora["folder"] for lora in manifest["loras"]}


def test_the_page_and_the_last_words_say_how_servers_start(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, task = tmp_path / "out", TASKS[2]
    run_export(str(runs.folder / "MHR"), out, format="serving", tasks=(task,))
    words, page = capsys.readouterr().out, (out / "README.md").read_text()
    assert f"MHR: 1 LoRA, ranks up to 8 -> {out} (serving)" in words
    assert "in one batch of stock PEFT, the logits of all are the originals'" in words
    assert f"sh {shlex.quote(str(out / 'vllm.sh'))}" in words
    request = f'"adapter_id": "{out}/loras/copy", "adapter_source": "local"'
    for text in (words, page):
        assert f"vllm serve {runs.base} \\" in text
        assert f"{task}=loras/copy" in text
        assert f"lorax-launcher --model-id {runs.base} --max-active-adapters 1" in text
        assert request in text
    assert page.startswith('---\nlibrary_name: "peft"\n')  # a folder is no model of the hub
    assert files(out) == [
        *("README.md", "export.json", "export.yaml", "loras", "manifest.json", "vllm.sh")
    ]


def test_a_backbone_of_the_hub_is_served_at_its_commit_and_all_can_be_pushed(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, settings = tmp_path / "out", {"format": "serving", "hub": "o/loras", "check": False}
    with hub_server.serving() as hub, hub_server.hub_at(hub.url, tmp_path / "cache"):
        commit = hub.add("o/base", runs.base)
        facts = {"name": "o/base", "revision": "main"}
        run = runs.save(tmp_path / "run", make(runs.model, "LoRA"), backbone=facts)
        run_export(run, out, **settings)
        first = dict(hub.repositories["o/loras"].branches)
        run_export(run, out, **settings, licence="mit")
        second = hub.repositories["o/loras"]
    assert (read(out)["base_model"], read(out)["revision"]) == ("o/base", commit)
    config = json.loads((out / "loras" / "run" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("o/base", commit)
    assert f"vllm serve o/base --revision {commit} " in (out / "vllm.sh").read_text()
    assert f"lorax-launcher --model-id o/base --revision {commit} " in capsys.readouterr().out
    pushed = second.commits[second.branches["main"]]
    assert second.branches != first
    assert pushed["manifest.json"] == (out / "manifest.json").read_bytes()
    assert "loras/run/adapter_model.safetensors" in pushed
    assert pushed["README.md"].startswith(b'---\nbase_model: "o/base"\nlibrary_name: "peft"\n')
    assert b'\nlicense: "mit"\n' in pushed["README.md"]


def test_jobs_are_chosen_by_pattern_and_tasks_by_name(runs: Runs, tmp_path: Path) -> None:
    run = str(runs.few_shot)
    out = run_export(run, tmp_path / "out", format="serving", jobs=("0/*",), check=False)
    assert [lora["name"] for lora in read(out)["loras"]] == ["new one/0/LoRA", "new one/0/MHR"]
    routed = str(runs.folder / "MHR")
    settings: dict[str, Any] = {"also": (run,), "tasks": ("copy", "new one"), "check": False}
    out = run_export(routed, tmp_path / "both", format="serving", jobs=("1/LoRA",), **settings)
    assert [lora["name"] for lora in read(out)["loras"]] == ["copy", "new one/1/LoRA"]


def test_a_lora_that_a_bit_was_changed_of_is_found(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(single: Adapter, **settings: Any) -> Adapter:
        padded = pad(single, **settings)
        next(padded.inventory.parameters()).data.mul_(1.1)
        return padded

    monkeypatch.setattr("mhr_scale.jobs.served_loras.pad", damaged)
    with pytest.raises(AdapterError, match=r"/out: not exported: the logits of what stock PEFT"):
        run_export(str(runs.folder / "MHR"), tmp_path / "out", format="serving")
    assert files(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RunError, match=r"^folder: what is served takes .* has .* left; name "):
        run_export(str(runs.folder / "MHR"), tmp_path / "out", format="serving")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"what": "average", "format": "serving"}, "^format: serving .*what: average;"),
        ({"also": ("x",)}, "^also, jobs, max_loras: .*serving"),
        ({"jobs": ("MHR",)}, "^also, jobs, max_loras: .*serving"),
        ({"max_loras": 2}, "^also, jobs, max_loras: .*serving"),
        ({"max_loras": 0, "format": "serving"}, "^max_loras: 0 "),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExportConfig(adapter="runs/x", folder="out", **settings)


@pytest.fixture(scope="module")
def odd(runs: Runs) -> Runs:
    """Runs that no server takes beside those that they do."""
    lora, folder = make(runs.model, "LoRA"), runs.folder
    runs.save(folder / "moved", lora, backbone={"name": "elsewhere"})
    runs.save(folder / "older", lora, backbone={"name": str(runs.base), "revision": "v1"})
    runs.save(folder / "random", lora, backbone={"config": {"model_type": "llama"}})
    runs.save(folder / "whole", lora, origin={"backbone": "backbone.safetensors"})
    runs.job(0, "LoRA", run=folder / "unfinished", done=False)
    save_run(folder / "T5", make_toy("LoRA"))
    return runs


@pytest.mark.parametrize(
    ("run", "settings", "words"),
    [
        ("IA3", {}, r"/IA3: cannot be served: \(IA\)3 .*format: merged"),
        ("wide", {}, "/wide: rank 513 .*512"),
        ("MHR", {"tasks": ("cop",)}, "^tasks: none is called 'cop'; did you mean 'copy'"),
        ("MHR", {"jobs": ("0/*",)}, r"^jobs: 0/\*, and no run folder of adapt"),
        ("few_shot", {"jobs": ("MHR", "RA")}, "/few_shot: jobs: 'RA' is none of new one/0/LoRA"),
        ("MHR", {"also": ("middle",)}, "^also: .*/MHR and .*/middle both .* 'sort/it'"),
        ("LoRA", {"also": ("moved",)}, "/LoRA was trained on .*/base, .*/moved on elsewhere: "),
        ("LoRA", {"also": ("older",)}, "/LoRA was trained on .*/base, .*/older on .*/base at v1: "),
        ("random", {}, "/random: its backbone has random weights"),
        ("unfinished", {}, "/unfinished: no job has finished yet"),
        ("whole", {}, "/whole: cannot be served: it trained the backbone's weights"),
        ("T5", {}, "/T5: cannot be served: .* encoder-decoder .*vLLM.*; set format: merged"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    run: str, settings: dict, words: str, odd: Runs, tmp_path: Path
) -> None:
    if "also" in settings:
        settings = {**settings, "also": tuple(str(odd.folder / one) for one in settings["also"])}
    with pytest.raises(AdapterError, match=words) as caught:
        run_export(str(odd.folder / run), tmp_path / "out", format="serving", **settings)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == []
