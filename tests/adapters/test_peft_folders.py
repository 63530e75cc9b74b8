"""PEFT folders: every round trip is exact, and one loader opens them and native artefacts."""

from dataclasses import replace

import pytest
import torch
from peft_folders import (
    IA3,
    LORA,
    MHR,
    POLY,
    QUERY,
    STORED,
    WITHOUT_OTHERS,
    assert_same,
    edit,
    make,
    read,
    write,
)
from safetensors.torch import load_file, save_file
from stock_peft import load_stock
from tiny import TASKS, make_adapted

from mhr_scale.adapters import AdapterConfig, artefact, peft_folders
from mhr_scale.adapters.collapse import average
from mhr_scale.errors import AdapterError

pytestmark = WITHOUT_OTHERS

# --- round trips


def test_a_single_adapter_comes_back_bit_for_bit(single, tmp_path):
    found = read(write(single, tmp_path))
    assert_same(found, single)
    assert (found.config, found.sites) == (single.config, single.sites)
    assert found.task_names == single.task_names


def test_an_inventory_with_routing_comes_back_bit_for_bit(routed, tmp_path):
    if routed.config.alpha != 1.0:
        routed = make(replace(routed.config, alpha=1.0))
    found = read(write(routed, tmp_path))
    assert_same(found, routed)
    assert (found.config, found.sites) == (routed.config, routed.sites)
    assert found.task_names == TASKS


def test_alpha_of_an_inventory_comes_back_inside_b(tmp_path):
    adapter = make(MHR)
    found = read(write(adapter, tmp_path))
    assert found.config == replace(MHR, alpha=1.0)
    sides = {name: tensor for name, tensor in artefact.named_tensors(adapter).items()}
    for name, tensor in artefact.named_tensors(found).items():
        assert torch.equal(tensor, sides[name] * (3.0 if name.endswith(".B") else 1.0))


def test_writing_again_gives_the_same_bytes(single, tmp_path):
    first, second = write(single, tmp_path / "1"), write(single, tmp_path / "2")
    for name in (peft_folders.CONFIG, peft_folders.TENSORS, peft_folders.NOTE):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_float64_adapter_is_stored_in_float32(tmp_path):
    _, adapter = make_adapted(LORA)
    write(adapter, tmp_path)
    tensors = load_file(tmp_path / peft_folders.TENSORS).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_lora_that_stock_peft_saved_again_comes_back_bit_for_bit(tmp_path):
    adapter = make(MHR, average)
    load_stock(write(adapter, tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
    assert_same(read(tmp_path / "theirs"), adapter)


def test_a_lora_needs_no_note_of_ours(lora_folder):
    (lora_folder / peft_folders.NOTE).unlink()
    found = read(lora_folder)
    assert_same(found, make(LORA))
    assert found.task_names == ("task_0",)


def test_a_lora_stored_in_bfloat16_is_read_exactly(lora_folder):
    stored = load_file(lora_folder / peft_folders.TENSORS)
    save_file({k: t.bfloat16() for k, t in stored.items()}, lora_folder / peft_folders.TENSORS)
    found = dict(artefact.named_tensors(read(lora_folder)))[f"{QUERY}.B"]
    expected = stored[f"{STORED}.lora_B.weight"].bfloat16().float().T
    assert torch.equal(found[0, 0], expected)


def test_tasks_of_a_poly_folder_can_be_named(tmp_path):
    names = ("a", "b", "c", "d")
    folder = write(make(POLY), tmp_path)
    assert peft_folders.read_peft_poly(folder, task_names=names).task_names == names


# --- one loader for all


@pytest.mark.parametrize("place", ["adapter", "run"])
def test_a_native_artefact_is_opened(place, tmp_path):
    adapter = make(MHR)
    folder = tmp_path if place == "adapter" else tmp_path / "adapter"
    artefact.save(adapter, folder, step=7, backbone={"name": "t5"})
    card, found = peft_folders.open_adapter(tmp_path)
    assert_same(found, adapter)
    assert (card.step, card.backbone, card.adapter) == (7, {"name": "t5"}, MHR)


@pytest.mark.parametrize(
    ("config", "kind"), [(LORA, "LORA"), (IA3, "IA3"), (POLY, "POLY")], ids=["LoRA", "IA3", "Poly"]
)
def test_a_peft_folder_is_opened_with_the_name_of_its_backbone(config, kind, tmp_path):
    adapter = make(config)
    card, found = peft_folders.open_adapter(
        str(write(adapter, tmp_path, base_model="bigscience/T0"))
    )
    assert_same(found, adapter)
    assert card.backbone == {"name": "bigscience/T0"}
    assert card.origin == {"format": f"PEFT {kind}", "path": str(tmp_path), "dtype": "float32"}
    assert (card.adapter, card.sites) == (adapter.config, adapter.sites)
    assert card.task_names == adapter.task_names


def test_a_peft_folder_without_a_backbone_says_so(lora_folder):
    assert peft_folders.open_adapter(lora_folder)[0].backbone == {}


def test_another_kind_of_peft_folder_is_refused(lora_folder):
    edit(lora_folder, peft_type="LOHA")
    with pytest.raises(AdapterError, match="peft_type 'LOHA' is none of LORA, IA3, POLY"):
        peft_folders.open_adapter(lora_folder)


@pytest.mark.parametrize("name", [".", "missing", "notes.txt"])
def test_a_path_without_an_adapter_tells_what_was_looked_for(name, tmp_path):
    (tmp_path / "notes.txt").write_text("no adapter")
    with pytest.raises(AdapterError, match=r"adapter.json.*adapter_config.json.*\.safetensors"):
        peft_folders.open_adapter(tmp_path / name)


def test_the_run_folder_of_a_fine_tuning_opens_as_the_adapter_in_it(tmp_path):
    adapter = make(AdapterConfig(n_skills=1, rank=2))
    peft_folders.write_peft_lora(adapter, tmp_path / "run" / "adapter", base_model=None)
    _, found = peft_folders.open_adapter(tmp_path / "run")
    assert all(a.equal(b) for a, b in zip(found.parameters(), adapter.parameters(), strict=True))
