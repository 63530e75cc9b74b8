"""PEFT folders, ours and its own: stock PEFT computes what the native adapter does."""

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PolyConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_folders import GATED, LORA, MHR, UNGATED, WITHOUT_OTHERS, edit, make, write
from processes import run_code
from safetensors.torch import load_file, save_file
from stock_peft import TASK_IDS, load_stock, make_stock, native_logits, stock_logits
from tiny import TASKS, make_batch, make_t5

from mhr_scale.adapters import find_sites, peft_folders
from mhr_scale.adapters.collapse import average

pytestmark = WITHOUT_OTHERS


def assert_close(found, expected, relative):
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * largest)


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
