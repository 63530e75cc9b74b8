"""PEFT folders: stock PEFT computes what the native adapter does, and every round trip is exact."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PolyConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import TASKS, attach_copy, logits, make_adapted, make_batch, make_t5

from mhr_scale.adapters import AdapterConfig, find_sites, interop, state
from mhr_scale.adapters.collapse import average, collapse
from mhr_scale.adapters.layout import recognise_sites
from mhr_scale.errors import AdapterError, LayoutError

# of transformers and torch, whatever adapter is loaded
OTHERS = (".is_gradient_checkpointing. is deprecated", ".torch.jit.script_method. is deprecated")
pytestmark = pytest.mark.filterwarnings(*(f"ignore:{message}" for message in OTHERS))

TASK_IDS = (2, 0, 2, 1, 3, 3)
GATED = {}
UNGATED = {"feed_forward_proj": "relu"}
MHR = AdapterConfig(n_skills=3, n_splits=4, rank=2, alpha=3.0)
LORA = AdapterConfig(n_skills=1, rank=2, alpha=3.0)
IA3 = AdapterConfig(kind="ia3", layout="light", n_skills=1)
POLY = AdapterConfig(n_skills=3, rank=2)
SINGLES = {
    "LoRA": (LORA, None),
    "light LoRA": (replace(LORA, layout="light"), None),
    "attention LoRA": (replace(LORA, layout="attention"), None),
    "alpha of 2.5": (replace(LORA, alpha=2.5), None),
    "averaged MHR": (MHR, average),
    "averaged light MHR": (replace(MHR, layout="light"), average),
    "collapsed MHR": (MHR, lambda adapter: collapse(adapter, "sort")),
    "averaged private LoRAs": (replace(LORA, private=True), average),
    "(IA)3": (IA3, None),
    "full (IA)3": (replace(IA3, layout="full"), None),
    "averaged MHR-(IA)3": (replace(IA3, n_skills=3, n_splits=4), average),
}
ROUTED = {
    "Poly": POLY,
    "MHR": replace(MHR, alpha=1.0),
    "light MHR, alpha of 3": replace(MHR, layout="light"),
    "noisy MHR": replace(MHR, alpha=1.0, policy="noisy", temperature=0.5),
}
QUERY = "encoder.block.0.layer.0.SelfAttention.q"
STORED = f"base_model.model.{QUERY}"


def make(config, change=None, **backbone):
    _, adapter = make_adapted(config, dtype=torch.float32, **backbone)
    return change(adapter) if change else adapter


def write(adapter, folder, base_model=None):
    """Write with the function that fits the adapter."""
    if adapter.config.is_routed:
        return interop.write_peft_poly(adapter, folder, base_model=base_model)
    kinds = {"lora": interop.write_peft_lora, "ia3": interop.write_peft_ia3}
    return kinds[adapter.config.kind](adapter, folder, base_model=base_model)


def read(folder):
    return interop.open_adapter(folder)[1]


def native_logits(adapter, dtype=torch.float32, **backbone):
    model = make_t5(**backbone).to(dtype).eval()
    ids = TASK_IDS if adapter.config.is_routed else [0] * len(TASK_IDS)
    return logits(model, attach_copy(model, adapter.to(dtype)), ids)


def stock_logits(model, dtype=torch.float32, *, is_routed):
    """Logits of a PEFT model in evaluation mode."""
    extra = {"task_ids": torch.tensor(TASK_IDS)} if is_routed else {}
    with torch.no_grad():
        return model.to(dtype).eval()(**make_batch(len(TASK_IDS)), **extra).logits


def load_stock(folder, **backbone):
    """What stock PEFT loads; any warning about the adapter is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in OTHERS:
            warnings.filterwarnings("ignore", message=message)
        return PeftModel.from_pretrained(make_t5(**backbone), folder)


def assert_close(found, expected, relative):
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * largest)


def assert_same(found, expected):
    """Bit for bit the same tensors under the same names."""
    found, expected = state.named_tensors(found), state.named_tensors(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def edit(folder, **fields):
    """Change fields of the configuration."""
    config = json.loads((folder / interop.CONFIG).read_text())
    (folder / interop.CONFIG).write_text(json.dumps({**config, **fields}))


def rewrite(folder, change):
    """Change stored tensors in place."""
    tensors = load_file(folder / interop.TENSORS)
    change(tensors)
    save_file(tensors, folder / interop.TENSORS)


def make_stock(config, folder, **backbone):
    """A folder that stock PEFT saved, and the logits of its model; no tensor is trivial."""
    model = get_peft_model(make_t5(**backbone), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "poly_")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(1.0 + 0.3 * noise if "ia3_" in name else 0.3 * noise)
    expected = stock_logits(model, is_routed=isinstance(config, PolyConfig))
    model.save_pretrained(folder)
    return expected


@pytest.fixture(params=SINGLES)
def single(request):
    return make(*SINGLES[request.param])


@pytest.fixture(params=ROUTED)
def routed(request):
    return make(ROUTED[request.param])


@pytest.fixture
def lora_folder(tmp_path):
    return write(make(LORA), tmp_path / "peft")


# --- what stock PEFT makes of our folders


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"]
)
def test_stock_peft_gives_the_logits_of_a_single_adapter(single, dtype, relative, tmp_path):
    model = load_stock(write(single, tmp_path))
    found = stock_logits(model, dtype, is_routed=False)
    assert_close(found, native_logits(single, dtype), relative)


@pytest.mark.parametrize("layout", ["full", "light", "attention"])
def test_stock_peft_gives_the_logits_of_a_lora_on_an_ungated_backbone(layout, tmp_path):
    adapter = make(replace(LORA, layout=layout), **UNGATED)
    found = stock_logits(load_stock(write(adapter, tmp_path), **UNGATED), is_routed=False)
    assert_close(found, native_logits(adapter, **UNGATED), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"]
)
def test_stock_peft_gives_the_logits_of_an_inventory_with_routing(
    routed, dtype, relative, tmp_path
):
    model = load_stock(write(routed, tmp_path))
    found = stock_logits(model, dtype, is_routed=True)
    # alpha is folded into B in float32
    exact = routed.config.alpha == 1.0 or dtype == torch.float32
    assert_close(found, native_logits(routed, dtype), relative if exact else 1e-6)


def test_the_adapter_matters_to_the_logits_compared(single):
    bare = make_t5().eval()(**make_batch(len(TASK_IDS))).logits
    found = native_logits(single)
    assert (found - bare).abs().max() > 0.1 * found.abs().max()


@pytest.mark.parametrize("backbone", [GATED, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize("layout", ["full", "light", "attention"])
def test_stock_peft_adapts_exactly_our_linears(layout, backbone, tmp_path):
    adapter = make(replace(LORA, layout=layout), **backbone)
    model = load_stock(write(adapter, tmp_path), **backbone).get_base_model()
    adapted = [name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    assert adapted == [site.name for site in adapter.sites]


@pytest.mark.slow
def test_an_exported_lora_runs_in_a_process_without_this_package(tmp_path):
    adapter = make(MHR, average)
    folder = write(adapter, tmp_path / "peft")
    make_t5().save_pretrained(tmp_path / "t5")
    save_file(make_batch(len(TASK_IDS)), tmp_path / "batch.safetensors")
    code = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

torch.set_num_threads(1)
backbone = T5ForConditionalGeneration.from_pretrained("t5")
with torch.no_grad():
    logits = PeftModel.from_pretrained(backbone, "peft")(**load_file("batch.safetensors")).logits
assert not [name for name in sys.modules if name.partition(".")[0] == "mhr_scale"]
save_file({"logits": logits}, "logits.safetensors")
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert folder.name == "peft"
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert_close(found, native_logits(adapter), 1e-5)


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
    sides = {name: tensor for name, tensor in state.named_tensors(adapter).items()}
    for name, tensor in state.named_tensors(found).items():
        assert torch.equal(tensor, sides[name] * (3.0 if name.endswith(".B") else 1.0))


def test_writing_again_gives_the_same_bytes(single, tmp_path):
    first, second = write(single, tmp_path / "1"), write(single, tmp_path / "2")
    for name in (interop.CONFIG, interop.TENSORS, interop.NOTE):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_float64_adapter_is_stored_in_float32(tmp_path):
    _, adapter = make_adapted(LORA)
    write(adapter, tmp_path)
    tensors = load_file(tmp_path / interop.TENSORS).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_lora_that_stock_peft_saved_again_comes_back_bit_for_bit(tmp_path):
    adapter = make(MHR, average)
    load_stock(write(adapter, tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
    assert_same(read(tmp_path / "theirs"), adapter)


def test_a_lora_needs_no_note_of_ours(lora_folder):
    (lora_folder / interop.NOTE).unlink()
    found = read(lora_folder)
    assert_same(found, make(LORA))
    assert found.task_names == ("task_0",)


# --- folders that stock PEFT saved


@pytest.mark.parametrize("backbone", [GATED, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize("targets", [["k", "v", "wi_1", "wi"], ["q", "k", "v", "o"]])
def test_a_stock_lora_gives_the_same_logits_here(targets, backbone, tmp_path):
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=5, lora_dropout=0.1, target_modules=targets
    )
    expected = make_stock(config, tmp_path, **backbone)
    adapter = interop.read_peft_lora(tmp_path)
    assert (adapter.config.alpha, adapter.config.rank) == (5.0, 2)
    assert_close(native_logits(adapter, **backbone), expected, 1e-5)


def test_a_rank_stabilised_lora_has_its_scale_in_alpha(tmp_path):
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=3,
        lora_alpha=2,
        use_rslora=True,
        target_modules=["q", "k", "v", "o"],
    )
    expected = make_stock(config, tmp_path)
    adapter = interop.read_peft_lora(tmp_path)
    assert adapter.config.scale == pytest.approx(2 / 3**0.5, rel=1e-15)
    assert_close(native_logits(adapter), expected, 1e-5)


def test_a_lora_stored_in_bfloat16_is_read_exactly(lora_folder):
    stored = load_file(lora_folder / interop.TENSORS)
    save_file({k: t.bfloat16() for k, t in stored.items()}, lora_folder / interop.TENSORS)
    found = dict(state.named_tensors(read(lora_folder)))[f"{QUERY}.B"]
    expected = stored[f"{STORED}.lora_B.weight"].bfloat16().float().T
    assert torch.equal(found[0, 0], expected)


@pytest.mark.parametrize("known_by", ["d_model", "the backbone's folder"])
def test_a_stock_ia3_gives_the_same_logits_here(known_by, tmp_path):
    backbone = {"d_kv": 6, "d_ff": 56}
    config = IA3Config(
        task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wi_1"], feedforward_modules=[]
    )
    expected = make_stock(config, tmp_path / "peft", **backbone)
    make_t5(**backbone).save_pretrained(tmp_path / "t5")
    edit(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "t5"))
    if known_by == "d_model":
        edit(tmp_path / "peft", base_model_name_or_path="somewhere/else")
        adapter = interop.read_peft_ia3(tmp_path / "peft", d_model=32)
    else:
        adapter = interop.read_peft_ia3(tmp_path / "peft")
    assert adapter.sites == find_sites(make_t5(**backbone), "light")
    assert_close(native_logits(adapter, **backbone), expected, 1e-5)


def test_a_stock_poly_gives_the_same_logits_here(tmp_path):
    config = PolyConfig(
        task_type="SEQ_2_SEQ_LM",
        r=2,
        n_tasks=len(TASKS),
        n_skills=3,
        n_splits=2,
        target_modules=["q", "k", "v", "o"],
    )
    expected = make_stock(config, tmp_path)
    adapter = interop.read_peft_poly(tmp_path)
    assert (adapter.config.layout, adapter.config.policy) == ("attention", "noisy")
    assert adapter.task_names == ("task_0", "task_1", "task_2", "task_3")
    assert_close(native_logits(adapter), expected, 1e-5)


def test_tasks_of_a_poly_folder_can_be_named(tmp_path):
    names = ("a", "b", "c", "d")
    folder = write(make(POLY), tmp_path)
    assert interop.read_peft_poly(folder, task_names=names).task_names == names


# --- what is refused


@pytest.mark.parametrize(
    ("config", "writer", "words"),
    [
        (MHR, interop.write_peft_lora, "MHR .* PEFT LoRA: it is no single adapter; average it or"),
        (POLY, interop.write_peft_ia3, "Poly .* PEFT IA3: it is no single adapter; average it or"),
        (replace(LORA, private=True), interop.write_peft_lora, "no single adapter; average it or"),
        (replace(MHR, policy="uniform"), interop.write_peft_lora, "no single adapter; average it"),
        (IA3, interop.write_peft_lora, r"\(IA\)3 .* write_peft_ia3 writes this kind"),
        (LORA, interop.write_peft_ia3, "LoRA .* write_peft_lora writes this kind"),
        (LORA, interop.write_peft_poly, "LoRA .* as PEFT Poly: there is nothing to route"),
        (replace(POLY, private=True), interop.write_peft_poly, "one inventory for all tasks"),
        (replace(IA3, n_skills=3), interop.write_peft_poly, "mixes low-rank pairs only; average"),
        (replace(POLY, granularity="block"), interop.write_peft_poly, "shared by block, PEFT has"),
        *(
            (replace(POLY, policy=policy), interop.write_peft_poly, f"no policy '{policy}'; aver")
            for policy in ("uniform", "random", "fixed", "straight_through")
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
        ({"rank_pattern": {"q": 4}}, "rank_pattern: {'q': 4}: no adapter of ours can express"),
        ({"alpha_pattern": {"q": 4}}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"some_future_setting": 0.5}, "some_future_setting: 0.5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the backbone"),
        ({"r": "2"}, "r is '2', not a number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"r": 0}, "adapter.rank: 0 is not at least 1"),
    ],
)
def test_settings_of_a_lora_that_we_cannot_express_are_refused(fields, words, lora_folder):
    edit(lora_folder, **fields)
    with pytest.raises(AdapterError, match=words):
        interop.read_peft_lora(lora_folder)


@pytest.mark.parametrize(
    ("reader", "found"),
    [(interop.read_peft_ia3, "IA3"), (interop.read_peft_poly, "POLY")],
    ids=["ia3", "poly"],
)
def test_a_folder_of_another_type_is_refused(reader, found, lora_folder):
    with pytest.raises(AdapterError, match=f"peft_type is 'LORA', not '{found}'"):
        reader(lora_folder)


@pytest.mark.parametrize("inputs", [None, ["wo"], r".*\.wo"])
def test_ia3_vectors_that_scale_inputs_are_refused(inputs, tmp_path):
    folder = write(make(replace(IA3, layout="full")), tmp_path)
    edit(folder, feedforward_modules=inputs)
    with pytest.raises(AdapterError, match=r"feedforward_modules .* which scales inputs .*wo"):
        interop.read_peft_ia3(folder)


def test_ia3_vectors_of_a_backbone_of_unknown_width_are_refused(tmp_path):
    folder = write(make(IA3), tmp_path)
    (folder / interop.NOTE).unlink()
    with pytest.raises(AdapterError, match="do not tell the width of the backbone; pass d_model"):
        interop.read_peft_ia3(folder)


def test_another_router_than_polys_is_refused(tmp_path):
    folder = write(make(POLY), tmp_path)
    edit(folder, poly_type="clustered")
    with pytest.raises(AdapterError, match="poly_type 'clustered'"):
        interop.read_peft_poly(folder)


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({"task_names": ["a"]}, "1 task names for 4 routing rows"),
        ({"task_names": "abcd"}, "task_names is 'abcd'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
    ],
)
def test_a_note_that_does_not_fit_is_refused(note, words, tmp_path):
    folder = write(make(POLY), tmp_path)
    (folder / interop.NOTE).write_text(json.dumps(note))
    with pytest.raises(AdapterError, match=words):
        interop.read_peft_poly(folder)


def drop(tensors):
    del tensors[f"{STORED}.lora_A.weight"]


def drop_linear(tensors):
    for side in "AB":
        del tensors[f"{STORED}.lora_{side}.weight"]


def add(tensors):
    tensors[f"{STORED}.lora_magnitude_vector"] = torch.zeros(32)


def add_linear(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 32)


def reshape(tensors):
    tensors[f"{STORED}.lora_A.weight"] = torch.zeros(2, 31)


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
        (drop_linear, f"nearest is 'full', with 1 odd: missing {QUERY}"),
        (add, f"unknown {STORED}.lora_magnitude_vector"),
        (add_linear, "nearest is 'full', with 1 odd: unknown lm_head"),
        (reshape, rf"{QUERY}.A is \[1, 1, 31, 2\], not \[1, 1, 32, 2\]"),
        (rerank, rf"{QUERY}.B is \[1, 1, 3, 32\], not \[1, 1, 2, 32\]"),
        (flatten, rf"{QUERY}.B is \[64\], not \[1, 1, 2, 32\]"),
        (poison, f"{QUERY}.B holds NaN or infinity"),
        (poison_all, r"72 tensor\(s\) do not fit: .* holds NaN or infinity; .* holds NaN"),
        (rename, "none of its 72 tensors is named"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, words, lora_folder):
    rewrite(lora_folder, change)
    with pytest.raises(AdapterError, match=words):
        interop.read_peft_lora(lora_folder)


def test_routing_tables_of_another_shape_are_listed(tmp_path):
    folder = write(make(POLY), tmp_path)
    table = f"{STORED}.poly_router.module_logits"
    rewrite(folder, lambda tensors: tensors.update({table: torch.zeros(4, 5)}))
    with pytest.raises(AdapterError, match=rf"{QUERY}.routing_logits is \[4, 5\], not \[4, 1, 3\]"):
        interop.read_peft_poly(folder)


def test_linears_of_no_layout_are_named(tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    make_stock(config, tmp_path)
    words = "12 linears are those of no layout; nearest is 'attention', with 12 odd: missing"
    with pytest.raises(AdapterError, match=words):
        interop.read_peft_lora(tmp_path)


def test_pickled_tensors_are_refused(lora_folder):
    tensors = load_file(lora_folder / interop.TENSORS)
    torch.save(tensors, lora_folder / "adapter_model.bin")
    (lora_folder / interop.TENSORS).unlink()
    with pytest.raises(AdapterError, match=r"only adapter_model.bin, .* save it as safetensors"):
        interop.read_peft_lora(lora_folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (interop.TENSORS, b"", "not a safetensors file"),
        (interop.TENSORS, None, "not a safetensors file"),
        (interop.CONFIG, b"{", "not JSON"),
        (interop.CONFIG, b"[]", "not a JSON object"),
        (interop.CONFIG, None, "cannot be read"),
    ],
)
def test_a_missing_or_broken_file_is_refused(name, content, words, lora_folder):
    (lora_folder / name).unlink()
    if content is not None:
        (lora_folder / name).write_bytes(content)
    with pytest.raises(AdapterError, match=words):
        interop.read_peft_lora(lora_folder)


# --- one loader for all


@pytest.mark.parametrize("place", ["adapter", "run"])
def test_a_native_artefact_is_opened(place, tmp_path):
    adapter = make(MHR)
    folder = tmp_path if place == "adapter" else tmp_path / "adapter"
    state.save(adapter, folder, step=7, backbone={"name": "t5"})
    card, found = interop.open_adapter(tmp_path)
    assert_same(found, adapter)
    assert (card.step, card.backbone, card.adapter) == (7, {"name": "t5"}, MHR)


@pytest.mark.parametrize(
    ("config", "kind"), [(LORA, "LORA"), (IA3, "IA3"), (POLY, "POLY")], ids=["LoRA", "IA3", "Poly"]
)
def test_a_peft_folder_is_opened_with_the_name_of_its_backbone(config, kind, tmp_path):
    adapter = make(config)
    card, found = interop.open_adapter(str(write(adapter, tmp_path, base_model="bigscience/T0")))
    assert_same(found, adapter)
    assert card.backbone == {"name": "bigscience/T0"}
    assert card.origin == {"format": f"PEFT {kind}", "path": str(tmp_path)}
    assert (card.adapter, card.sites) == (adapter.config, adapter.sites)
    assert card.task_names == adapter.task_names


def test_a_peft_folder_without_a_backbone_says_so(lora_folder):
    assert interop.open_adapter(lora_folder)[0].backbone == {}


def test_another_kind_of_peft_folder_is_refused(lora_folder):
    edit(lora_folder, peft_type="LOHA")
    with pytest.raises(AdapterError, match="peft_type 'LOHA' is none of LORA, IA3, POLY"):
        interop.open_adapter(lora_folder)


@pytest.mark.parametrize("name", [".", "missing", "notes.txt"])
def test_a_path_without_an_adapter_tells_what_was_looked_for(name, tmp_path):
    (tmp_path / "notes.txt").write_text("no adapter")
    with pytest.raises(AdapterError, match=r"adapter.json.*adapter_config.json.*\.safetensors"):
        interop.open_adapter(tmp_path / name)


# --- sites without a backbone


@pytest.mark.parametrize("backbone", [GATED, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize("layout", ["full", "light", "attention"])
def test_sites_are_recognised_by_name_in_the_order_of_the_model(layout, backbone):
    sites = find_sites(make_t5(num_layers=3, **backbone), layout)
    widths = {s.name: (s.in_features, s.out_features) for s in reversed(sites)}
    assert recognise_sites(widths) == (layout, sites)


@pytest.mark.parametrize(
    ("drop", "count"),
    [("encoder.block.1.", 3), ("decoder.block.0", 5), (".EncDecAttention.", 6), (".v", 9)],
)
def test_sites_that_are_not_all_there_are_named(drop, count):
    sites = find_sites(make_t5(num_layers=3, num_decoder_layers=3), "light")
    widths = {site.name: (32, 32) for site in sites if drop not in site.name}
    with pytest.raises(LayoutError, match=f"nearest is 'light', with {count} odd: missing"):
        recognise_sites(widths)


def test_sites_far_beyond_the_others_are_named():
    widths = {site.name: (32, 32) for site in find_sites(make_t5(), "light")}
    widths["decoder.block.999999999.layer.0.SelfAttention.k"] = (32, 32)
    with pytest.raises(LayoutError, match="with 1 odd: unknown decoder"):
        recognise_sites(widths)


def test_the_run_folder_of_a_fine_tuning_opens_as_the_adapter_in_it(tmp_path):
    adapter = make(AdapterConfig(n_skills=1, rank=2))
    interop.write_peft_lora(adapter, tmp_path / "run" / "adapter", base_model=None)
    _, found = interop.open_adapter(tmp_path / "run")
    assert all(a.equal(b) for a, b in zip(found.parameters(), adapter.parameters(), strict=True))
