"""The verb `export`: what stock PEFT loads is the original, and what fails leaves nothing."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import ROOT, run_code
from safetensors.torch import load_file, save_file
from toy_exports import (
    BASE,
    N_ROWS,
    TASKS,
    assert_close,
    assert_same,
    files,
    make,
    native_logits,
    rows,
    run_export,
    save_run,
    save_runs,
    toy_t5,
)

from mhr_scale.adapters import Adapter, artefact, peft_folders
from mhr_scale.adapters.collapse import average, collapse, soup
from mhr_scale.errors import AdapterError
from mhr_scale.exchange.reloading import spread

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",
    "ignore:.torch.jit.script_method. is deprecated",
)
TASK_IDS = (2, 0, 1, 1, 2, 0)
TASK = TASKS[1]
SOUP = (TASKS[0], TASKS[2])
#: The README's own.
TWELVE_LINES = re.search(
    r"```python\n(from peft .*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL
)[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each kind of adapter, and finished few-shot jobs."""
    kinds = ("MHR", "Poly", "LoRA", "IA3", "MHR-IA3", "private", "shared routing", "uniform")
    folder = save_runs(tmp_path_factory.mktemp("runs"), *kinds)
    for kind in ("MHR", "LoRA", "uniform"):
        job = folder / "few_shot" / "jobs" / "a task" / "0" / kind
        save_run(job, make(kind, tasks=("a task",)), origin={"job": f"a task/0/{kind}"})
    return folder


def read(folder: Path | str) -> Adapter:
    return peft_folders.open_adapter(folder)[1]


# --- what is exported


@pytest.mark.parametrize(
    ("form", "kind", "settings", "change"),
    [
        ("native", "MHR", {"what": "average"}, average),
        ("native", "IA3", {"what": "whole"}, lambda adapter: adapter),
        ("peft", "MHR", {"what": "average"}, average),
        ("peft", "MHR", {"what": "task", "task": TASK}, lambda adapter: collapse(adapter, TASK)),
        ("peft", "MHR-IA3", {"what": "task", "task": TASK}, lambda one: collapse(one, TASK)),
        ("peft", "private", {"what": "task", "task": TASK}, lambda one: collapse(one, TASK)),
        ("peft", "private", {"what": "soup", "tasks": SOUP}, lambda one: soup(one, SOUP)),
        ("peft", "private", {"what": "average"}, average),
        ("peft", "LoRA", {"what": "whole"}, lambda adapter: adapter),
        ("peft", "IA3", {"what": "average"}, lambda adapter: adapter),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_asked_for_is_what_is_written(
    kind: str, settings: dict, change: Any, form: str, runs: Path, tmp_path: Path
) -> None:
    folder = run_export(str(runs / kind), tmp_path / "out", format=form, **settings)
    found, expected = read(folder), change(make(kind))
    assert_close(native_logits(found), native_logits(expected))
    if form == "native":
        assert_same(found, expected)


@pytest.mark.parametrize("form", ["peft", "native"])
def test_all_tasks_are_a_folder_each(form: str, runs: Path, tmp_path: Path) -> None:
    folder = run_export(str(runs / "MHR"), tmp_path / "all", what="all_tasks", format=form)
    names = json.loads((folder / "tasks.json").read_text())
    assert names == {
        "copy.plus1.plain": TASKS[0],
        "sort%2Fit": TASKS[1],
        "reverse.mirror.after": TASKS[2],
    }
    for name, task in names.items():
        assert_same(read(folder / name), collapse(make("MHR"), task))


@pytest.mark.parametrize(
    ("run", "change"),
    [
        ("MHR", average),
        ("private", average),
        ("LoRA", lambda adapter: adapter),
        ("few_shot/jobs/a task/0/LoRA", lambda adapter: adapter),
        ("few_shot/jobs/a task/0/MHR", lambda adapter: collapse(adapter, "a task")),
        ("few_shot/jobs/a task/0/uniform", average),
    ],
)
def test_without_a_word_a_run_is_averaged_and_a_job_is_what_it_computes(
    run: str, change: Any, runs: Path, tmp_path: Path
) -> None:
    stored = read(runs / run)
    folder = run_export(str(runs / run), tmp_path / "out")
    assert_same(read(folder), change(stored))


@pytest.mark.parametrize("form", ["native", "peft_poly"])
def test_formats_that_hold_it_get_the_whole_adapter(form: str, runs: Path, tmp_path: Path) -> None:
    assert_same(read(run_export(str(runs / "MHR"), tmp_path / "out", format=form)), make("MHR"))


def test_the_recipe_lies_beside_what_it_made(runs: Path, tmp_path: Path) -> None:
    folder = run_export(str(runs / "LoRA"), tmp_path / "out")
    stored = [peft_folders.CONFIG, peft_folders.TENSORS, peft_folders.NOTE]
    assert files(folder) == sorted([*stored, "README.md", "export.json", "export.yaml"])


def test_a_peft_folder_names_a_backbone_that_stock_libraries_find(
    runs: Path, tmp_path: Path
) -> None:
    folder = run_export(str(runs / "LoRA"), tmp_path / "out")
    config = json.loads((folder / peft_folders.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(BASE)


def test_the_artefact_knows_its_backbone_and_where_it_is_from(runs: Path, tmp_path: Path) -> None:
    source = str(runs / "LoRA")
    folder = run_export(source, tmp_path / "out", format="native", backbone_moved_to=str(BASE))
    card = artefact.read_card(folder)
    assert card.origin == {"exported_from": source, "what": "whole"}
    assert (card.backbone["name"], card.backbone["dtype"]) == (str(BASE), "float32")


def test_the_last_words_say_what_was_written_and_how_to_load_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(str(runs / "MHR"), tmp_path / "out", what="task", task=TASK)
    words = capsys.readouterr().out
    assert f"task {TASK} -> {tmp_path / 'out'} (peft)" in words
    assert "the logits are the original's" in words
    assert f'PeftModel.from_pretrained(model, "{tmp_path / "out"}")' in words


def test_of_many_tasks_the_first_the_last_and_some_between_are_compared() -> None:
    assert spread(3) == [0, 1, 2]
    assert spread(60) == [0, 8, 16, 25, 33, 42, 50, 59]


# --- in a fresh process, with stock libraries alone

FRESH = """
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

torch.set_num_threads(1)
base, *folders = sys.argv[1:]
rows, found = load_file("rows.safetensors"), {}
for folder in folders:
    kind = folder.split("_")[0]
    place = folder if kind == "merged" else base
    model = T5ForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    if kind != "merged":
        model = PeftModel.from_pretrained(model, folder)
    extra = {"task_ids": torch.tensor([2, 0, 1, 1, 2, 0])} if kind == "poly" else {}
    with torch.no_grad():
        found[folder] = model.eval()(**rows, **extra).logits
assert not [name for name in sys.modules if name.partition(".")[0] == "mhr_scale"]
save_file(found, "logits.safetensors")
"""
MERGED = {"format": "merged", "dtype": "float32"}
#: Run, settings, the original whose logits are expected, and its tasks.
EXPORTS: dict[str, tuple[str, dict, Any, tuple[int, ...]]] = {
    "peft_average": ("MHR", {}, average, (0,) * N_ROWS),
    "peft_task": ("MHR", {"what": "task", "task": TASK}, None, (1,) * N_ROWS),
    "peft_soup": ("private", {"what": "soup", "tasks": SOUP}, lambda a: soup(a, SOUP), (0,) * 6),
    "peft_lora": ("LoRA", {}, None, (0,) * N_ROWS),
    "peft_ia3": ("IA3", {}, None, (0,) * N_ROWS),
    "peft_ia3_task": ("MHR-IA3", {"what": "task", "task": TASK}, None, (1,) * N_ROWS),
    "peft_job": ("few_shot/jobs/a task/0/MHR", {}, None, (0,) * N_ROWS),
    "poly_mhr": ("MHR", {"format": "peft_poly"}, None, TASK_IDS),
    "poly": ("Poly", {"format": "peft_poly"}, None, TASK_IDS),
    "merged_lora": ("LoRA", MERGED, None, (0,) * N_ROWS),
    "merged_ia3": ("IA3", MERGED, None, (0,) * N_ROWS),
    "merged_task": (
        "MHR",
        {**MERGED, "what": "task", "task": TASK, "max_shard_bytes": 200_000},
        None,
        (1,) * N_ROWS,
    ),
}


@pytest.fixture(scope="module")
def fresh(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of all exports in one process that knows stock libraries alone."""
    here = tmp_path_factory.mktemp("fresh")
    for name, (run, settings, _, _) in EXPORTS.items():
        run_export(str(runs / run), here / name, **settings)
    save_file(rows(), here / "rows.safetensors")
    run_code(FRESH, str(BASE), *EXPORTS, folder=here)
    return load_file(here / "logits.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_stock_libraries_alone_give_the_logits_of_the_original(
    name: str, fresh: dict[str, torch.Tensor], runs: Path
) -> None:
    run, _, change, task_ids = EXPORTS[name]
    original = read(runs / run)
    expected = native_logits(change(original) if change else original, task_ids)
    assert_close(fresh[name], expected)


def test_the_adapters_matter_to_the_logits_compared(runs: Path) -> None:
    with torch.no_grad():
        bare = toy_t5()(**rows()).logits
    for run, _, change, task_ids in EXPORTS.values():
        original = read(runs / run)
        found = native_logits(change(original) if change else original, task_ids)
        assert (found - bare).abs().max() > 0.05 * bare.abs().max()


@pytest.mark.slow
def test_twelve_lines_load_and_generate(runs: Path, tmp_path: Path) -> None:
    run_export(str(runs / "MHR"), tmp_path / "runs" / "toy_export")
    (tmp_path / "mhr_scale" / "tasks").mkdir(parents=True)
    (tmp_path / "mhr_scale" / "tasks" / "toy_backbone").symlink_to(BASE)
    code = f"{TWELVE_LINES}\nimport sys\nassert 'mhr_scale' not in sys.modules\n"
    assert len(TWELVE_LINES.strip().splitlines()) <= 12
    answers = run_code(code, folder=tmp_path).strip().splitlines()[-1]
    assert len(ast.literal_eval(answers)) == 2


@pytest.mark.slow
def test_the_launch_script_exports_without_deepspeed(runs: Path, tmp_path: Path) -> None:
    recipe, script = (ROOT / "launch" / name for name in ("recipes/toy_export.yaml", "export.py"))
    code = (
        "import runpy, sys\n"
        "sys.argv[:1] = []\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    settings = (f"adapter={runs / 'MHR'}", f"folder={tmp_path / 'out'}")
    run_code(code, str(script), str(recipe), *settings, folder=tmp_path)
    assert_same(read(tmp_path / "out"), average(make("MHR")))


# --- imports and round trips


@pytest.mark.parametrize(
    ("kind", "form"),
    [("LoRA", "peft"), ("IA3", "peft"), ("Poly", "peft_poly"), ("MHR", "peft_poly")],
)
def test_native_to_peft_to_native_is_bit_for_bit(
    kind: str, form: str, runs: Path, tmp_path: Path
) -> None:
    there = run_export(str(runs / kind), tmp_path / "peft", format=form, what="whole")
    back = run_export(str(there), tmp_path / "native", format="native")
    assert_same(artefact.load(back), make(kind))


def test_a_lora_that_stock_peft_saved_becomes_an_artefact(tmp_path: Path) -> None:
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=3, lora_alpha=5, use_rslora=True, target_modules=list("qkvo")
    )
    model = get_peft_model(toy_t5(), config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2)
    with torch.no_grad():
        expected = model(**rows()).logits
    model.save_pretrained(tmp_path / "stock")
    model.unload()
    settings = {"format": "native", "backbone_moved_to": "builtin:toy"}
    folder = run_export(str(tmp_path / "stock"), tmp_path / "native", **settings)
    assert artefact.read_card(folder).backbone["name"] == "builtin:toy"
    assert_close(native_logits(artefact.load(folder)), expected)


def test_a_published_checkpoint_becomes_an_artefact(tmp_path: Path) -> None:
    adapter, published = make("MHR"), {}
    sides = {"A": "lora_a", "B": "lora_b", "routing_logits": "selector.module_logits"}
    for name, tensor in artefact.named_tensors(adapter).items():
        linear, _, side = name.rpartition(".")
        tensor = tensor.flatten(1) if side == "routing_logits" else tensor
        published[f"model.{linear}.{sides[side]}"] = tensor.contiguous()
    save_file(published, tmp_path / "published.safetensors")
    folder = run_export(
        str(tmp_path / "published.safetensors"),
        tmp_path / "native",
        format="native",
        backbone_moved_to="builtin:toy",
    )
    found = artefact.load(folder)
    assert_close(native_logits(found, TASK_IDS), native_logits(adapter, TASK_IDS), 1e-12)


def test_what_was_imported_can_be_exported(runs: Path, tmp_path: Path) -> None:
    poly = run_export(str(runs / "MHR"), tmp_path / "poly", format="peft_poly")
    single = run_export(str(poly), tmp_path / "single", what="task", task=TASK)
    assert_same(read(single), collapse(make("MHR"), TASK))


# --- without the check


@pytest.mark.parametrize("form", ["peft", "native"])
def test_without_the_check_no_backbone_is_needed(form: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make("LoRA"), backbone={})
    assert_same(
        read(run_export(run, tmp_path / "out", check=False, format=form)), read(tmp_path / "run")
    )


def test_the_check_says_when_the_backbone_is_unknown(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make("LoRA"), backbone={})
    with pytest.raises(AdapterError, match=r"set backbone_moved_to, or check: false"):
        run_export(run, tmp_path / "out")


# --- the target


def test_an_empty_folder_will_do_and_parents_are_made(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert_same(read(run_export(str(runs / "LoRA"), folder)), make("LoRA"))
    assert files(tmp_path) == ["a", "empty"]


def test_the_target_may_be_a_link_to_an_empty_folder(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    run_export(str(runs / "LoRA"), tmp_path / "link")
    assert (tmp_path / "disk" / peft_folders.CONFIG).is_file()
    assert (tmp_path / "link").is_symlink()


def test_other_ranks_of_a_launcher_do_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    run_export(str(runs / "LoRA"), tmp_path / "out")
    assert files(tmp_path) == []
