"""The one door of all verbs to adapters: what their files leave out, their backbone tells."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.adapters.peft_folders import write_peft_ia3, write_peft_lora
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.backbone.of_adapter import open_adapter
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError


def make_folder(folder: Path, kind: str, *, base: str) -> Path:
    """A PEFT folder over the toy backbone, without our note."""
    with torch.device("meta"):
        model = make_model(read_blueprint(BackboneConfig(name="builtin:toy")))
    config = AdapterConfig(kind=kind, layout="light", n_skills=1, rank=2)  # type: ignore[arg-type]
    adapter = Adapter(config, find_sites(model, "light"), task_names=["a"])
    write = write_peft_ia3 if kind == "ia3" else write_peft_lora
    write(adapter, folder, base_model=base)
    (folder / "mhr_scale.json").unlink()
    return folder


@pytest.mark.parametrize("base", ["somewhere/else", "builtin:toy"])
def test_the_width_of_vectors_comes_from_where_the_backbone_is(base: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "ia3", base=base)
    card, adapter = open_adapter(str(folder), None if base == "builtin:toy" else "builtin:toy")
    assert {site.in_features for site in adapter.sites} == {64}
    assert card.backbone["name"] == base


def test_a_backbone_that_is_needed_and_not_found_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = make_folder(tmp_path, "ia3", base="./not/here")
    with pytest.raises(BackboneError, match=r"no folder './not/here'.*set backbone_moved_to") as e:
        open_adapter(str(folder))
    assert str(e.value).startswith(f"{folder}: its backbone: ")
    assert "\n" not in str(e.value)


def test_a_backbone_that_is_not_needed_is_not_looked_for(tmp_path: Path) -> None:
    card, _ = open_adapter(str(make_folder(tmp_path, "lora", base="./not/here")))
    assert card.backbone == {"name": "./not/here"}


def test_what_was_filled_up_and_in_which_precision_it_was_stored_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path, "lora", base="builtin:toy")
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    dropped = "encoder.block.0.layer.0.SelfAttention.k"
    kept = {n: t.to(torch.bfloat16) for n, t in load_file(file).items() if dropped not in n}
    save_file(kept, file)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "exclude_modules": dropped}))
    with caplog.at_level(logging.INFO, logger="mhr_scale"):
        open_adapter(str(folder))
    said = " ".join(caplog.messages)
    assert "its linears: 15 of the 16 of layout light, zeros in the others" in said
    assert "stored in bfloat16, held in float32" in said
