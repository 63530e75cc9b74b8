"""PEFT folders: what is not written, and what is refused when one is read."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft_folders import IA3, LORA, MHR, POLY, QUERY, STORED, WITHOUT_OTHERS, edit, make, write
from safetensors.torch import load_file, save_file
from stock_peft import make_stock
from tiny import make_t5

from mhr_scale.adapters import peft_folders
from mhr_scale.errors import AdapterError

pytestmark = WITHOUT_OTHERS


def rewrite(folder, change):
    """Change stored tensors in place."""
    tensors = load_file(folder / peft_folders.TENSORS)
    change(tensors)
    save_file(tensors, folder / peft_folders.TENSORS)


@pytest.mark.parametrize(
    ("config", "writer", "words"),
    [
        (MHR, peft_folders.write_peft_lora, "MHR .*PEFT LoRA: .*single"),
        (
            replace(LORA, private=True),
            peft_folders.write_peft_lora,
            "private .*PEFT LoRA: .*single",
        ),
        (replace(MHR, policy="uniform"), peft_folders.write_peft_ia3, "MHR .*PEFT IA3: .*single"),
        (IA3, peft_folders.write_peft_lora, r"\(IA\)3 .* write_peft_ia3"),
        (LORA, peft_folders.write_peft_ia3, "LoRA .* write_peft_lora"),
        (LORA, peft_folders.write_peft_poly, "LoRA .*PEFT Poly: .*nothing to route"),
        (replace(POLY, private=True), peft_folders.write_peft_poly, "PEFT Poly: .*one inventory"),
        (replace(IA3, n_skills=3), peft_folders.write_peft_poly, r"Poly-\(IA\)3 .*low-rank"),
        (replace(POLY, granularity="block"), peft_folders.write_peft_poly, "shared by block"),
        *(
            (replace(POLY, policy=policy), peft_folders.write_peft_poly, f"'{policy}'")
            for policy in ("random", "straight_through")
        ),
    ],
)
def test_what_peft_cannot_express_is_not_written(config, writer, words, tmp_path):
    with pytest.raises(AdapterError, match=words) as error:
        writer(make(config), tmp_path / "peft", base_model=None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, r"use_dora: True \(DoRA, .*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\] \(whole modules"),
        ({"rank_pattern": {"q": "4"}}, "rank_pattern.q is '4', not a number"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q is 0, below 1"),
        ({"rank_pattern": {"q": 4}}, r"\S+\.q\.A is \[32, 2\], of another rank than 4"),
        ({"target_modules": ["v"]}, r"a pair of \S+\.k, which is no target by adapter_config.json"),
        ({"target_modules": "("}, r"target_modules \( \(missing"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\], not numbers by name"),
        ({"alpha_pattern": {"(": 4}}, r"alpha_pattern: '\(': missing"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, no text"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"some_future_setting": 0.5}, "some_future_setting: 0.5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": 0}, "adapter.rank: 0 "),
    ],
)
def test_settings_of_a_lora_that_we_cannot_express_are_refused(fields, words, lora_folder):
    edit(lora_folder, **fields)
    with pytest.raises(AdapterError, match=rf"^{lora_folder}/\S+: {words}"):
        peft_folders.open_adapter(lora_folder)


@pytest.mark.parametrize(
    ("reader", "found"),
    [(peft_folders.read_peft_ia3, "IA3"), (peft_folders.read_peft_poly, "POLY")],
    ids=["ia3", "poly"],
)
def test_a_folder_of_another_type_is_refused(reader, found, lora_folder):
    with pytest.raises(AdapterError, match=f"peft_type is 'LORA', not '{found}'"):
        reader(lora_folder)


@pytest.mark.parametrize("inputs", [["k"], r".*\.k"])
def test_ia3_vectors_that_scale_the_residual_stream_are_refused(inputs, tmp_path):
    folder = write(make(IA3), tmp_path)
    edit(folder, feedforward_modules=inputs)
    with pytest.raises(AdapterError, match=r"adapter_config.json: .* scales the inputs of .*\.k"):
        peft_folders.read_peft_ia3(folder)


def test_ia3_vectors_of_another_shape_than_their_inputs_are_refused(tmp_path):
    folder = write(make(replace(IA3, layout="full")), tmp_path)
    edit(folder, feedforward_modules=["wo"])
    with pytest.raises(AdapterError, match=r"wo\.l does not fit .*wi_1\.l"):
        peft_folders.read_peft_ia3(folder)


def test_ia3_vectors_of_a_backbone_of_unknown_width_are_refused(tmp_path):
    folder = write(make(IA3), tmp_path)
    (folder / peft_folders.NOTE).unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: .*width"):
        peft_folders.read_peft_ia3(folder)


def test_another_router_than_polys_is_refused(tmp_path):
    folder = write(make(POLY), tmp_path)
    edit(folder, poly_type="clustered")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: poly_type 'clustered'"):
        peft_folders.read_peft_poly(folder)


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({"task_names": ["a"]}, "adapter_model.safetensors: 1 .* 4 routing rows"),
        ({"task_names": "abcd"}, "mhr_scale.json: task_names is 'abcd'"),
        ({"temperature": "hot"}, "mhr_scale.json: temperature is 'hot'"),
    ],
)
def test_a_note_that_does_not_fit_is_refused(note, words, tmp_path):
    folder = write(make(POLY), tmp_path)
    (folder / peft_folders.NOTE).write_text(json.dumps(note))
    with pytest.raises(AdapterError, match=words):
        peft_folders.read_peft_poly(folder)


def drop(tensors):
    del tensors[f"{STORED}.lora_A.weight"]


def drop_linear(tensors):
    for side in "AB":
        del tensors[f"{STORED}.lora_{side}.weight"]


def add(tensors):
    tensors[f"{STORED}.lora_magnitude_vector"] = torch.zeros(32)


def add_linear(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 32)


def rerank(tensors):
    tensors[f"{STORED}.lora_B.weight"] = torch.zeros(32, 3)


def flatten(tensors):
    tensors[f"{STORED}.lora_B.weight"] = torch.zeros(64)


def poison(tensors):
    tensors[f"{STORED}.lora_B.weight"][0, 0] = float("nan")


def poison_all(tensors):
    for tensor in tensors.values():
        tensor.fill_(float("inf"))


def rename(tensors):
    for name in list(tensors):
        tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, f"missing {QUERY}.A"),
        (drop_linear, f"35 linears .*'full', .*missing {QUERY}"),
        (add, f"unknown {STORED}.lora_magnitude_vector"),
        (add_linear, "37 linears .*'full', .*unknown lm_head"),
        (rerank, rf"{QUERY}.B is \[1, 1, 3, 32\], not \[1, 1, 2, 32\]"),
        (flatten, rf"{QUERY}.B is \[64\], not \[1, 1, 2, 32\]"),
        (poison, f"{QUERY}.B holds NaN or infinity"),
        (poison_all, r": 72 tensor\(s\) .*k\.A holds NaN or infinity; .*k\.B holds NaN"),
        (rename, "none of its 72 tensors .*lora_"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, words, lora_folder):
    rewrite(lora_folder, change)
    with pytest.raises(AdapterError, match=words):
        peft_folders.read_peft_lora(lora_folder)


def test_routing_tables_of_another_shape_are_listed(tmp_path):
    folder = write(make(POLY), tmp_path)
    table = f"{STORED}.poly_router.module_logits"
    rewrite(folder, lambda tensors: tensors.update({table: torch.zeros(4, 5)}))
    with pytest.raises(AdapterError, match=rf"{QUERY}.routing_logits is \[4, 5\], not \[4, 1, 3\]"):
        peft_folders.read_peft_poly(folder)


def test_linears_left_out_of_a_backbone_that_is_not_found_are_named(tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=r"decoder\..*\.(q|v)")
    make_stock(config, tmp_path)
    words = r"8 linears .*'q, v', with 2 odd: missing encoder\.block\.0\..*\.q;"
    with pytest.raises(AdapterError, match=f"{words}.* names no backbone; set backbone_moved_to"):
        peft_folders.read_peft_lora(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sizes", "words"),
    [
        ({"r": 1 << 20}, {}, r"describes an adapter of up to \d+ numbers"),
        ({"r": 1 << 40}, {}, "adapter.rank: 1099511627776 is above"),
        ({}, {"num_layers": 10**9}, "those of no layout"),
        ({}, {"d_model": "32"}, "those of no layout"),
        ({"target_modules": 3}, {}, "target_modules 3"),
        ({"target_modules": "("}, {}, r"target_modules \("),
        ({"layers_to_transform": "0"}, {}, "layers_to_transform '0'"),
        ({"layers_to_transform": [0, -1]}, {}, r"layers_to_transform '\[0, -1\]'"),
        (
            {"layers_to_transform": [0], "layers_pattern": "(", "exclude_modules": None},
            {},
            "target_modules",
        ),
    ],
)
def test_linears_left_out_by_a_damaged_description_are_refused(settings, sizes, words, tmp_path):
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=2,
        target_modules=["q", "v"],
        exclude_modules=r"decoder\.block\.0\..*EncDec.*\.v",
    )
    make_stock(config, tmp_path / "peft")
    make_t5().save_pretrained(tmp_path / "t5")
    file = tmp_path / "t5" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **sizes}))
    edit(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "t5"), **settings)
    with pytest.raises(AdapterError, match=words) as error:
        peft_folders.open_adapter(tmp_path / "peft")
    assert "\n" not in str(error.value)


def test_linears_of_no_layout_are_refused_with_the_way_out(tmp_path):
    targets = ["q", "k", "v", "o", "lm_head"]
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=targets)
    make_stock(config, tmp_path / "peft")
    make_t5().save_pretrained(tmp_path / "t5")
    edit(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "t5"))
    with pytest.raises(AdapterError, match=r"unknown lm_head.*no layout with all.*merge_and"):
        peft_folders.read_peft_lora(tmp_path / "peft")


def test_a_linear_that_the_configuration_names_is_not_left_out(lora_folder, tmp_path):
    make_t5().save_pretrained(tmp_path / "t5")
    edit(lora_folder, base_model_name_or_path=str(tmp_path / "t5"))
    rewrite(lora_folder, drop_linear)
    with pytest.raises(AdapterError, match=f"names are not there: missing {QUERY}"):
        peft_folders.read_peft_lora(lora_folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.zeros(2, dtype=torch.int8)}, "'a' is int8; adapters are float32, bfloat16"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' is complex64"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "'a' is stored as torch.sparse_coo, not dense"),
        ({"a": torch.zeros(2, device="meta")}, r"'a' has no numbers \(device meta\)"),
        ({3: torch.zeros(2)}, "3 its name is no text"),
        ({"a": 3}, "holds no state_dict"),
        (LoraConfig(), "cannot be read as tensors alone"),
    ],
    ids=["integers", "complex", "sparse", "meta", "number", "no-tensor", "code"],
)
def test_pickled_files_of_anything_but_tensors_are_refused(content, words, lora_folder):
    (lora_folder / peft_folders.TENSORS).unlink()
    torch.save(content, lora_folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=rf"/adapter_model\.bin: {words}"):
        peft_folders.read_peft_lora(lora_folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (peft_folders.TENSORS, b"", "not a safetensors file"),
        (peft_folders.TENSORS, None, "not a safetensors file"),
        (peft_folders.CONFIG, b"{", "not JSON"),
        (peft_folders.CONFIG, b"[]", "not a JSON object"),
        (peft_folders.CONFIG, None, "cannot be read"),
    ],
)
def test_a_missing_or_broken_file_is_refused(name, content, words, lora_folder):
    (lora_folder / name).unlink()
    if content is not None:
        (lora_folder / name).write_bytes(content)
    with pytest.raises(AdapterError, match=rf"/{name}(:1)?: {words}"):
        peft_folders.read_peft_lora(lora_folder)
