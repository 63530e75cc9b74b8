"""The verb `finetune` on what it cannot train: one line with the way out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from toy_finetunes import TOY, base_model, make_adapter, toy

from mhr_scale.adapters import AdapterConfig, artefact
from mhr_scale.adapters.peft_folders import write_peft_ia3
from mhr_scale.config import (
    BackboneConfig,
    FinetuneBackboneConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
)
from mhr_scale.errors import AdapterError, ConfigError
from mhr_scale.verbs.finetune import finetune

pytestmark = pytest.mark.usefixtures("on_cpu")


def refusal(config: FinetuneConfig, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        finetune(config)
    assert len(str(caught.value).splitlines()) == 1
    assert not (Path(config.run.folder) / "config.yaml").exists()
    return str(caught.value)


def test_an_artefact_of_ours_has_to_be_exported_first(tmp_path: Path) -> None:
    artefact.save(make_adapter(TOY), tmp_path / "run" / "adapter")
    message = refusal(toy(tmp_path / "run", tmp_path / "out"), AdapterError)
    assert str(tmp_path / "run") in message
    assert "mhr_scale export" in message


def test_a_peft_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    settings = AdapterConfig(kind="ia3", n_skills=1)
    write_peft_ia3(make_adapter(TOY, settings), tmp_path / "ia3", base_model=None)
    message = refusal(toy(tmp_path / "ia3", tmp_path / "out"), AdapterError)
    assert str(tmp_path / "ia3") in message
    assert "IA3" in message


def test_a_lora_of_another_backbone_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model(TOY), tmp_path / "narrow")
    card = json.loads((tmp_path / "narrow" / "config.json").read_text())
    (tmp_path / "narrow" / "config.json").write_text(json.dumps({**card, "d_ff": 96}))
    other = replace(TOY, name=str(tmp_path / "narrow"))
    message = refusal(toy(exported, tmp_path / "out", backbone=other), AdapterError)
    assert str(exported) in message
    assert "is (64, 192) there, (64, 96) here" in message


def test_a_lora_without_all_its_tensors_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "torn")
    file = tmp_path / "torn" / "adapter_model.safetensors"
    found = load_file(file)
    name = min(found)
    save_file({key: tensor for key, tensor in found.items() if key != name}, file)
    linear = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    with pytest.raises(AdapterError, match=rf"missing {linear}\.A"):
        finetune(toy(tmp_path / "torn", tmp_path / "out"))


def edited(exported: Path, folder: Path, **fields: Any) -> Path:
    """A copy of an exported folder with another configuration."""
    shutil.copytree(exported, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_what_the_other_verbs_could_not_read_is_not_trained(exported: Path, tmp_path: Path) -> None:
    dora = edited(exported, tmp_path / "dora", use_dora=True)
    message = refusal(toy(dora, tmp_path / "out"), AdapterError)
    assert "use_dora: True (DoRA, " in message
    assert "merge_and_unload" in message


def test_a_backbone_that_nobody_names_is_asked_for(exported: Path, tmp_path: Path) -> None:
    nameless = edited(exported, tmp_path / "nameless", base_model_name_or_path=None)
    config = toy(nameless, tmp_path / "out", backbone=FinetuneBackboneConfig(dtype="float32"))
    assert "set backbone.name" in refusal(config, AdapterError)


def test_an_unknown_task_comes_with_a_suggestion(exported: Path, tmp_path: Path) -> None:
    message = refusal(toy(exported, tmp_path / "out", task="sort.plus4.aftr"), ConfigError)
    assert "'sort.plus4.aftr'" in message
    assert "'sort.plus4.after'" in message


def test_a_task_unlike_any_other_comes_with_those_there_are(exported: Path, tmp_path: Path) -> None:
    message = refusal(toy(exported, tmp_path / "out", task="xxxx"), ConfigError)
    assert "suite toy has no task 'xxxx'; there are: " in message


def test_a_backbone_that_is_stored_nowhere_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^backbone\.name: "):
        toy(exported, tmp_path, backbone=BackboneConfig(config={"d_model": 64}))


def test_several_processes_are_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refusal(toy(exported, tmp_path / "out"), ConfigError)


def test_paged_optimizers_need_a_gpu(exported: Path, tmp_path: Path) -> None:
    optim = FinetuneOptimConfig(name="paged_adamw_8bit")
    with pytest.raises(ConfigError, match=r"paged_adamw_8bit.*adamw"):
        finetune(toy(exported, tmp_path, optim=optim))
