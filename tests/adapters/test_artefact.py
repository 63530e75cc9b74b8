"""The stored artefact: what is saved comes back, and nothing else is accepted."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TASKS, logits, make_adapted, make_t5, tensors_of

from mhr_scale.adapters import AdapterConfig, artefact, attach
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.errors import AdapterError

CONFIGS = {
    "LoRA": AdapterConfig(n_skills=1, rank=2, alpha=3.0),
    "MHR": AdapterConfig(n_skills=3, n_splits=4, rank=2),
    "by block": AdapterConfig(n_skills=3, granularity="block"),
    "noisy": AdapterConfig(n_skills=3, policy="noisy", temperature=0.5),
    "random": AdapterConfig(n_skills=3, policy="random", random_empty="uniform"),
    "fixed": AdapterConfig(n_skills=3, policy="fixed"),
    "private": AdapterConfig(n_skills=1, private=True),
    "ia3": AdapterConfig(kind="ia3", layout="light", n_skills=3),
}
QUERY = "encoder.block.0.layer.0.SelfAttention.q"
FILES = (artefact.TENSORS, artefact.CARD)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def saved(tmp_path):
    """Folder of a saved MHR adapter."""
    return artefact.save(make(CONFIGS["MHR"])[1], tmp_path / "adapter", step=7)


def make(config):
    model, adapter = make_adapted(config, dtype=torch.float32)
    return model.eval(), adapter


def rewrite(folder, change):
    """Store changed tensors as another program would: with the hash of the new file."""
    tensors = load_file(folder / artefact.TENSORS)
    change(tensors)
    save_file(tensors, folder / artefact.TENSORS)
    digest = hashlib.sha256((folder / artefact.TENSORS).read_bytes()).hexdigest()
    edit_card(folder, sha256=digest)


def edit_card(folder, **fields):
    card = json.loads((folder / artefact.CARD).read_text())
    (folder / artefact.CARD).write_text(json.dumps({**card, **fields}))


def drop(tensors):
    del tensors[f"{QUERY}.A"]


def add(tensors):
    tensors["encoder.block.9.A"] = torch.zeros(1)


def reshape(tensors):
    tensors[f"{QUERY}.A"] = tensors[f"{QUERY}.A"].flatten()


def poison(tensors):
    tensors[f"{QUERY}.B"][0, 0, 0, 0] = float("nan")


def overflow(tensors):
    tensors[f"{QUERY}.routing_logits"][0, 0, 0] = float("inf")


FAULTS = [
    (drop, f"missing {QUERY}.A"),
    (add, "unknown encoder.block.9.A"),
    (reshape, f"{QUERY}.A is [192], not [4, 3, 8, 2]"),
    (poison, f"{QUERY}.B holds NaN or infinity"),
    (overflow, f"{QUERY}.routing_logits holds NaN or infinity"),
]
FAULT_IDS = ["missing", "extra", "mis-shaped", "nan", "infinity"]


# --- saving and loading


def test_an_adapter_comes_back_with_its_tensors_and_setting_and_is_stored_in_the_same_bytes(
    config, tmp_path
):
    _, adapter = make(config)
    first = artefact.save(adapter, tmp_path / "first", step=3, backbone={"name": "x"})
    loaded = artefact.load(first)
    assert (loaded.config, loaded.sites) == (adapter.config, adapter.sites)
    assert loaded.task_names == adapter.task_names
    torch.testing.assert_close(tensors_of(loaded), tensors_of(adapter), rtol=0, atol=0)
    second = artefact.save(loaded, tmp_path / "second", step=3, backbone={"name": "x"})
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in FILES)


def test_saving_again_gives_the_same_bytes(tmp_path):
    _, adapter = make(CONFIGS["MHR"])
    folders = [artefact.save(adapter, tmp_path / str(number)) for number in range(8)]
    assert len({(folder / artefact.TENSORS).read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize("name", ["MHR", "private", "ia3"])
def test_an_adapter_loaded_into_a_model_gives_the_same_logits(name, tmp_path):
    model, adapter = make(CONFIGS[name])
    folder = artefact.save(adapter, tmp_path)
    fresh = make_t5().eval()
    loaded = artefact.load(folder, model=fresh)
    found = logits(fresh, loaded, ["sort", "copy", "count"])
    assert torch.equal(found, logits(model, adapter, ["sort", "copy", "count"]))


def test_a_loaded_adapter_can_be_trained(saved):
    model = make_t5()
    loaded = artefact.load(saved, model=model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fixed_routing_stays_fixed(tmp_path):
    loaded = artefact.load(artefact.save(make(CONFIGS["fixed"])[1], tmp_path))
    assert not loaded.routing_logits.requires_grad


def test_an_adapter_of_another_precision_is_stored_as_float32(tmp_path):
    _, adapter = make_adapted(CONFIGS["MHR"], dtype=torch.float64)
    tensors = load_file(artefact.save(adapter, tmp_path) / artefact.TENSORS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_tensors_are_stored_per_linear_and_per_routing_group(tmp_path):
    _, adapter = make(CONFIGS["by block"])
    tensors = load_file(artefact.save(adapter, tmp_path) / artefact.TENSORS)
    assert tensors[f"{QUERY}.A"].shape == (1, 3, 32, 1)
    assert tensors[f"{QUERY}.B"].shape == (1, 3, 1, 32)
    assert tensors["encoder.block.0.routing_logits"].shape == (len(TASKS), 1, 3)


def test_the_card_keeps_step_backbone_and_origin(tmp_path):
    facts = {"step": 12, "backbone": {"name": "t5"}, "origin": {"run": "x"}}
    card = artefact.read_card(artefact.save(make(CONFIGS["LoRA"])[1], tmp_path, **facts))
    assert {name: getattr(card, name) for name in facts} == facts


def test_saving_over_an_adapter_leaves_no_other_files(saved):
    artefact.save(make(CONFIGS["LoRA"])[1], saved)
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)


def test_a_run_folder_stands_for_the_adapter_in_it(saved):
    assert artefact.load(saved.parent).task_names == TASKS


# --- refusals


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=FAULT_IDS)
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(AdapterError) as caught:
        artefact.load(saved)
    assert f"1 tensor(s) do not fit: {message}" in str(caught.value)


@pytest.mark.parametrize("change", [drop, poison])
def test_a_refused_file_leaves_the_model_bare(saved, change):
    rewrite(saved, change)
    model = make_t5()
    with pytest.raises(AdapterError):
        artefact.load(saved, model=model)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())


@pytest.mark.parametrize("change", [drop, poison])
def test_refused_tensors_change_nothing(saved, change):
    _, adapter = make(CONFIGS["MHR"])
    adapter.inventory.requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.data.fill_(5.0)
    tensors = load_file(saved / artefact.TENSORS)
    change(tensors)
    with pytest.raises(AdapterError):
        artefact.load_tensors(adapter, tensors, place="there")
    assert all(bool((tensor == 5.0).all()) for tensor in tensors_of(adapter).values())


def test_a_damaged_tensor_file_is_refused(saved):
    data = bytearray((saved / artefact.TENSORS).read_bytes())
    data[-1] ^= 1
    (saved / artefact.TENSORS).write_bytes(data)
    with pytest.raises(AdapterError, match=r"its hash is not the one in adapter\.json"):
        artefact.load(saved)


def test_files_of_two_saves_are_refused(saved, tmp_path):
    other = artefact.save(make(CONFIGS["LoRA"])[1], tmp_path / "other")
    (saved / artefact.TENSORS).write_bytes((other / artefact.TENSORS).read_bytes())
    with pytest.raises(AdapterError, match=r"its hash is not the one in adapter\.json"):
        artefact.load(saved)


def test_a_tensor_file_of_another_format_is_refused(saved):
    (saved / artefact.TENSORS).write_bytes(b"tensors")
    edit_card(saved, sha256=hashlib.sha256(b"tensors").hexdigest())
    with pytest.raises(AdapterError, match="not a safetensors file"):
        artefact.load(saved)


def test_a_missing_tensor_file_is_refused(saved):
    (saved / artefact.TENSORS).unlink()
    with pytest.raises(AdapterError, match=r"adapter\.safetensors: missing"):
        artefact.load(saved)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter\.json here or in"):
        artefact.load(tmp_path)


def test_a_card_of_another_schema_is_refused(saved):
    edit_card(saved, schema=2)
    with pytest.raises(AdapterError, match="schema 2, this version reads 1"):
        artefact.load(saved)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "not JSON"),
        (b"{}", "not a readable adapter card"),
        (b"[]", "not a JSON object"),
        (b'{"schema": 1}', "not a readable adapter card"),
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
    ids=["empty", "no-fields", "list", "only-schema", "text", "bytes"],
)
def test_an_unreadable_card_is_refused(saved, text, fault):
    (saved / artefact.CARD).write_bytes(text)
    with pytest.raises(AdapterError, match=rf"adapter\.json.*{fault}"):
        artefact.load(saved)


def test_a_card_with_an_unknown_setting_is_refused(saved):
    card = json.loads((saved / artefact.CARD).read_text())
    edit_card(saved, adapter={**card["adapter"], "gates": 3})
    with pytest.raises(AdapterError, match="gates"):
        artefact.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ff": 64}, "encoder.block.0.layer.1.DenseReluDense.wi_0 is (32, 48) there, (32, 64)"),
        ({"num_layers": 1}, "encoder.block.1.layer.0.SelfAttention.q is (32, 32) there, nothing"),
        ({"num_layers": 3}, "layout 'full' has 36 linears there, 43 here"),
    ],
    ids=["wider", "shallower", "deeper"],
)
def test_an_adapter_for_another_backbone_names_a_linear_that_differs(saved, changes, message):
    with pytest.raises(AdapterError) as caught:
        artefact.load(saved, model=make_t5(**changes))
    assert "made for another backbone" in str(caught.value)
    assert message in str(caught.value)


def test_a_model_that_has_adapters_is_refused(saved):
    model = make_t5()
    attach(model, CONFIGS["LoRA"], tasks=TASKS)
    with pytest.raises(AdapterError, match="has adapters already"):
        artefact.load(saved, model=model)


# --- while a run saves

SAVE = """
import sys
from pathlib import Path
from mhr_scale.adapters import artefact
first, second, target = map(Path, sys.argv[1:])
saved = [artefact.read(folder) for folder in (first, second)]
print("saving", flush=True)
for number in range(10**9):
    card, adapter = saved[number % 2]
    artefact.save(adapter, target, step=card.step)
"""


def test_readers_see_one_save_whole_while_another_process_saves(tmp_path):
    folders = {}
    for step in (1, 2):
        _, adapter = make(CONFIGS["MHR"])
        for parameter in adapter.parameters():
            parameter.data.fill_(float(step))
        folders[step] = artefact.save(adapter, tmp_path / str(step), step=step)
    target = artefact.save(adapter, tmp_path / "run" / "adapter", step=2)
    command = [sys.executable, "-c", SAVE, *map(str, (*folders.values(), target))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "saving\n"
            seen = set()
            for _ in range(50):
                card, found = artefact.read(tmp_path / "run")
                values = {float(p.detach().min()) for p in found.parameters()}
                assert values == {float(card.step)}
                seen.add(card.step)
        finally:
            process.kill()
    assert seen == {1, 2}
