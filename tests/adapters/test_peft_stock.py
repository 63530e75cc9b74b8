"""PEFT folders, ours and its own: stock PEFT computes what the native adapter does."""

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PolyConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_folders import GATED, LORA, MHR, UNGATED, WITHOUT_OTHERS, edit, make, write
from processes import run_code
from safetensors.torch import load_file, save_file
from stock_peft import TASK_IDS, assert_close, load_stock, make_stock, native_logits, stock_logits
from tiny import TASKS, attach_copy, make_batch, make_t5

from mhr_scale.adapters import artefact, find_sites, peft_folders
from mhr_scale.adapters.collapse import average
from mhr_scale.errors import AdapterError
from mhr_scale.training.optim import Adafactor

pytestmark = WITHOUT_OTHERS


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
    run_code(code, folder=tmp_path)
    assert folder.name == "peft"
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert_close(found, native_logits(adapter), 1e-5)


# --- folders that stock PEFT saved


@pytest.mark.parametrize("backbone", [GATED, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize("targets", [["k", "v", "wi_1", "wi"], ["q", "k", "v", "o"]])
def test_a_stock_lora_gives_the_same_logits_here(targets, backbone, tmp_path):
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=5, lora_dropout=0.1, target_modules=targets
    )
    expected = make_stock(config, tmp_path, **backbone)
    adapter = peft_folders.read_peft_lora(tmp_path)
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
    adapter = peft_folders.read_peft_lora(tmp_path)
    assert adapter.config.scale == pytest.approx(2 / 3**0.5, rel=1e-15)
    assert_close(native_logits(adapter), expected, 1e-5)


@pytest.mark.parametrize("known_by", ["width", "the backbone's folder"])
def test_a_stock_ia3_gives_the_same_logits_here(known_by, tmp_path):
    backbone = {"d_kv": 6, "d_ff": 56}
    config = IA3Config(
        task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wi_1"], feedforward_modules=[]
    )
    expected = make_stock(config, tmp_path / "peft", **backbone)
    make_t5(**backbone).save_pretrained(tmp_path / "t5")
    edit(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "t5"))
    if known_by == "width":
        edit(tmp_path / "peft", base_model_name_or_path="somewhere/else")
        adapter = peft_folders.read_peft_ia3(tmp_path / "peft", width=32)
    else:
        adapter = peft_folders.read_peft_ia3(tmp_path / "peft")
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
    adapter = peft_folders.read_peft_poly(tmp_path)
    assert (adapter.config.layout, adapter.config.policy) == ("attention", "noisy")
    assert adapter.task_names == ("task_0", "task_1", "task_2", "task_3")
    assert_close(native_logits(adapter), expected, 1e-5)


# --- what our layouts, ranks and scales have to be stretched for


@pytest.fixture
def near(tmp_path):
    """Save a PEFT adapter of stock settings over a stored backbone; its logits and our adapter."""

    def make_near(config, **backbone):
        expected = make_stock(config, tmp_path / "peft", **backbone)
        make_t5(**backbone).save_pretrained(tmp_path / "t5")
        edit(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "t5"))
        return expected, peft_folders.open_adapter(tmp_path / "peft")

    return make_near


PARTIAL = {
    "the default of T5": {},
    "queries alone": {"target_modules": ["q"]},
    "decoder alone": {"target_modules": r"decoder\..*\.(q|v|wo)"},
    "first block": {"target_modules": ["q", "v"], "layers_to_transform": [0]},
    "second block": {"target_modules": ["k", "wi_0"], "layers_to_transform": 1},
    "all of the first block": {
        "target_modules": ["q", "k", "v", "o"],
        "layers_to_transform": [0],
    },
    "all but one": {"target_modules": ["q", "k", "v", "o"], "exclude_modules": r".*0.*EncDec.*\.k"},
}


#: Those that are no layout: one of the two stacks alone, or other linears in one block.
IRREGULAR = ("decoder alone", "all but one")


@pytest.mark.parametrize("backbone", [{}, UNGATED, {"num_decoder_layers": 3}, {"d_kv": 6}])
@pytest.mark.parametrize("name", PARTIAL)
def test_a_lora_on_some_linears_gives_the_same_logits_here(name, backbone, near):
    if backbone is UNGATED and name == "second block":
        pytest.skip("there is no wi_0")
    settings = {"target_modules": ["q", "v"], **PARTIAL[name]}
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=5, **settings)
    expected, (card, adapter) = near(config, **backbone)
    assert_close(native_logits(adapter, **backbone), expected, 1e-5)
    layout, blocks = adapter.config.layout, adapter.config.blocks
    assert adapter.sites == find_sites(make_t5(**backbone), layout, blocks)
    tensors = artefact.named_tensors(adapter)
    has_zeros = any(not tensors[f"{site.name}.B"].any() for site in adapter.sites)
    assert has_zeros == (name in IRREGULAR) == ("zeros in the others" in str(card.origin))


def test_linears_left_out_stay_out_when_the_rest_is_trained(near):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=r"decoder\..*\.(q|v)")
    _, (_, adapter) = near(config)
    model = make_t5()
    attached = attach_copy(model, adapter)
    before = {name: t.clone() for name, t in artefact.named_tensors(attached).items()}
    optimizers = [
        torch.optim.AdamW(attached.parameters(), lr=0.1),
        Adafactor(
            [{"params": list(attached.parameters()), "lr": 0.1, "lead": 1, "weight_decay": 0.0}],
            scale_parameter=True,
        ),
    ]
    for optimizer in optimizers:
        with attached.slots([0] * 6) as slots:
            slots.backward(model(**make_batch(6)).loss)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in artefact.named_tensors(attached).items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder"), name


@pytest.mark.parametrize("is_stabilised", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"q": 4, r"decoder.*\.v": 1}},
        {"alpha_pattern": {"SelfAttention.k": 7, "o": 0.5}},
        {"rank_pattern": {"k": 3}, "alpha_pattern": {"k": 6}},
        {"rank_pattern": {"^encoder.*": 5, "v": 3}, "alpha_pattern": {"v": 6}},
    ],
    ids=["ranks", "alphas", "both", "anchored"],
)
@pytest.mark.filterwarnings("ignore:.*rank_pattern:UserWarning")
def test_ranks_and_scales_of_single_linears_give_the_same_logits_here(
    patterns, is_stabilised, near
):
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=2,
        lora_alpha=4,
        use_rslora=is_stabilised,
        target_modules=["q", "k", "v", "o"],
        **patterns,
    )
    expected, (card, adapter) = near(config)
    assert_close(native_logits(adapter), expected, 5e-5)  # a scale in B is rounded once more
    assert {"ranks", "scales"} & card.origin.keys()


@pytest.mark.parametrize("backbone", [{}, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        (["k", "v", "wo"], None),
        (["k", "v", "wo"], ["wo"]),
        (["k", "v", "wo", "o"], ["wo", "o"]),
        (["k", "v", "wo", "wi_1", "wi"], r".*\.wo"),
    ],
    ids=["default", "T-Few's", "values twice", "hidden twice"],
)
def test_ia3_vectors_that_scale_inputs_give_the_same_logits_here(targets, inputs, backbone, near):
    config = IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=targets, feedforward_modules=inputs)
    expected, (_, adapter) = near(config, **backbone)
    assert adapter.config.layout == "light"
    assert_close(native_logits(adapter, **backbone), expected, 1e-5)


@pytest.mark.parametrize(
    "change", [{"feed_forward_proj": "gelu"}, {"negative": True}], ids=["gelu", "negative"]
)
def test_inputs_behind_an_activation_that_factors_do_not_pass_are_refused(change, near, tmp_path):
    config = IA3Config(
        task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"]
    )
    near(config, **UNGATED)
    if "negative" in change:
        file = tmp_path / "peft" / peft_folders.TENSORS
        save_file({name: t - 1.2 for name, t in load_file(file).items()}, file)
    else:
        make_t5(**change).save_pretrained(tmp_path / "t5")
    with pytest.raises(AdapterError, match=r"scales the inputs of .*\.wo: no adapter of ours"):
        peft_folders.open_adapter(tmp_path / "peft")


def test_the_width_of_ia3_comes_from_a_known_hub_id(tmp_path):
    backbone = {"d_model": 2048, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1}
    config = IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"])
    make_stock(config, tmp_path, **backbone)
    edit(tmp_path, base_model_name_or_path="bigscience/T0_3B")
    _, adapter = peft_folders.open_adapter(tmp_path)
    assert {site.in_features for site in adapter.sites} == {2048}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_in_another_precision_is_held_in_float32_and_says_so(dtype, near, tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "k", "v", "o"])
    near(config)
    file = tmp_path / "peft" / peft_folders.TENSORS
    stored = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    card, adapter = peft_folders.open_adapter(tmp_path / "peft")
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert card.precision == str(dtype).removeprefix("torch.")
    model = load_stock(tmp_path / "peft")
    assert_close(native_logits(adapter), stock_logits(model, is_routed=False), 1e-5)


def test_a_pickled_folder_is_read_without_running_code(near, tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "k", "v", "o"])
    expected, _ = near(config)
    file = tmp_path / "peft" / peft_folders.TENSORS
    torch.save(load_file(file), tmp_path / "peft" / "adapter_model.bin")
    file.unlink()
    assert_close(native_logits(peft_folders.open_adapter(tmp_path / "peft")[1]), expected, 1e-5)
