"""Adapters on every decoder-only family: stock PEFT, plain autograd, and what is read back."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_folders import LORA, MHR, OTHERS, WITHOUT_OTHERS, assert_same, edit, write
from small_causal import FAMILIES, make_rows, small_causal
from stock_peft import assert_close
from tiny import TASKS, attach_copy, randomise
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from mhr_scale import attach, detach
from mhr_scale.adapters import find_sites, peft_folders
from mhr_scale.adapters.collapse import collapse
from mhr_scale.adapters.sites import recognise_sites
from mhr_scale.errors import AdapterError
from mhr_scale.families.linear_modules import is_transposed
from mhr_scale.families.table import find_family

pytestmark = WITHOUT_OTHERS

EXPERTS = ("qwen3 moe", "mixtral")
#: Of each family, what the layouts adapt in a block; the usual seven and three of them otherwise.
FUSED = {"phi3": 4, "phi4": 4, "neox": 4, "falcon": 4, "falcon new": 4, "gpt2": 4}
COUNTS = {**dict.fromkeys(FAMILIES, (7, 3, 4)), **{name: (4, 2, 2) for name in FUSED}}
UNGATED = ("phi", "opt", "gptj")
COUNTS |= {**dict.fromkeys(UNGATED, (6, 3, 4)), **dict.fromkeys(EXPERTS, (4, 2, 4))}
TASK_IDS = (2, 0, 1)


def pack(model):
    return find_family(model.config).pack(make_rows(), model.config)


def logits(model, **extra):
    """Logits of three rows, answers side by side, without gradients."""
    packed = pack(model)
    packed = replace(packed, inputs={**packed.inputs, **extra})
    with torch.no_grad():
        found = find_family(model.config).logits(model, packed)
    return found[packed.labels_BD >= 0]


def native(model, adapter):
    """The same under our adapter."""
    with adapter.slots(TASK_IDS if adapter.config.is_routed else [0] * len(TASK_IDS)):
        return logits(model)


def adapted(name, config):
    model = small_causal(name)
    tasks = TASKS if config.is_routed else ("a",)
    return model, randomise(attach(model, config, tasks=tasks))


def load_stock(name, folder):
    """What stock PEFT loads; any warning about the adapter is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in OTHERS:
            warnings.filterwarnings("ignore", message=message)
        return PeftModel.from_pretrained(small_causal(name), folder).eval()


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_mean_the_same_and_are_told_from_names(name):
    model = small_causal(name)
    for layout, count in zip(("full", "light", "attention"), COUNTS[name], strict=True):
        sites = find_sites(model, layout)
        assert len(sites) == 2 * count
        widths = {site.name: (site.in_features, site.out_features) for site in reversed(sites)}
        assert recognise_sites(widths)[1] == sites


# -- stock PEFT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_peft_gives_the_logits_of_a_lora_and_the_folder_comes_back(name, tmp_path):
    model, adapter = adapted(name, LORA)
    expected = native(model, adapter)
    bare = logits(small_causal(name))
    assert (expected - bare).abs().max() > 0.05 * expected.abs().max()
    stock = load_stock(name, write(adapter, tmp_path))
    parts = stock.get_base_model().named_modules()
    found = {part_name for part_name, part in parts if isinstance(part, BaseTunerLayer)}
    assert found == {site.name for site in adapter.sites}
    assert_close(logits(stock), expected, 1e-5)
    again = peft_folders.open_adapter(tmp_path)[1]
    assert again.sites == adapter.sites
    assert_same(again, adapter)


#: PEFT's Poly knows no Conv1D, and no tokens of all rows in one dimension, as OPT has them.
WITHOUT_POLY = ("gpt2", "opt")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_POLY])
def test_mhr_gives_the_logits_of_peft_s_poly(name, tmp_path):
    model, adapter = adapted(name, replace(MHR, alpha=1.0))
    stock = load_stock(name, write(adapter, tmp_path))
    assert_close(logits(stock, task_ids=torch.tensor(TASK_IDS)), native(model, adapter), 1e-5)
    assert_same(peft_folders.open_adapter(tmp_path)[1], adapter)


@pytest.mark.parametrize("name", WITHOUT_POLY)
def test_mhr_gives_every_row_the_logits_of_its_task_s_own_adapter(name):
    model, adapter = adapted(name, replace(MHR, alpha=1.0))
    expected = native(model, adapter)
    owners = pack(model)
    owners = torch.arange(3)[:, None].expand_as(owners.labels_BD)[owners.labels_BD >= 0]
    detach(model)
    for row, task in enumerate(TASK_IDS):
        attached = attach_copy(model, collapse(adapter, TASKS[task]))
        assert_close(native(model, attached)[owners == row], expected[owners == row], 1e-5)
        detach(model)


def test_poly_over_conv1d_is_not_written(tmp_path):
    with pytest.raises(AdapterError, match="no Conv1D; average it"):
        write(adapted("gpt2", MHR)[1], tmp_path / "peft")


def test_a_lora_on_linears_of_unknown_width_of_the_residual_stream_comes_back(tmp_path):
    adapter = adapted("gpt2", replace(LORA, layout=("c_proj",)))[1]
    assert_same(peft_folders.open_adapter(write(adapter, tmp_path))[1], adapter)


PUBLISHED = {
    "q and v": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "the second block": LoraConfig(
        r=2,
        target_modules=["k_proj", "down_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
    ),
    "ranks and scales": LoraConfig(
        r=2, target_modules="all-linear", rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5}
    ),
    "without one": LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], exclude_modules=".*0.*o_proj"
    ),
    "(IA)3": IA3Config(),
}
ELSEWHERE = {
    "neox (IA)3": ("neox", IA3Config(target_modules=["query_key_value"], feedforward_modules=[])),
    "opt (IA)3": ("opt", IA3Config()),
    "gpt2": ("gpt2", LoraConfig(r=2, target_modules=["attn.c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 (IA)3": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=[], fan_in_fan_out=True),
    ),
    "phi3": ("phi3", LoraConfig(r=2, target_modules=["qkv_proj"])),
    "values of all heads": (
        "phi",
        IA3Config(target_modules=["dense"], feedforward_modules=["dense"]),
    ),
}
CASES = {name: ("llama", config) for name, config in PUBLISHED.items()} | ELSEWHERE


@pytest.mark.filterwarnings("ignore:.*rank_pattern:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_stock_peft_gives_the_same_logits_here(case, tmp_path):
    name, config = CASES[case]
    model = small_causal(name)
    model.save_pretrained(tmp_path / "backbone")
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    stock = get_peft_model(small_causal(name), config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise.abs() + 0.5 if "ia3" in parameter_name else noise)
    expected = logits(stock)
    stock.save_pretrained(tmp_path / "peft")
    edit(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "backbone"))
    card, adapter = peft_folders.open_adapter(tmp_path / "peft")
    assert adapter.sites == find_sites(model, adapter.config.layout, adapter.config.blocks)
    assert ("zeros" in str(card.origin.get("linears"))) == (case == "without one")
    assert_close(native(model, attach_copy(model, adapter)), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])),
        ("phi", IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"])),
        ("phi3", IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])),
    ],
    ids=["grouped values", "gelu", "gate and up in one"],
)
def test_inputs_that_nothing_else_writes_are_refused(name, config, tmp_path):
    small_causal(name).save_pretrained(tmp_path / "backbone")
    get_peft_model(small_causal(name), config).save_pretrained(tmp_path / "peft")
    edit(tmp_path / "peft", base_model_name_or_path=str(tmp_path / "backbone"))
    with pytest.raises(AdapterError, match=r"scales the inputs of .*: no adapter of ours"):
        peft_folders.open_adapter(tmp_path / "peft")
    edit(tmp_path / "peft", base_model_name_or_path="somewhere/else")
    with pytest.raises(AdapterError, match=r"in a backbone that is not found \(set backbone"):
        peft_folders.open_adapter(tmp_path / "peft")


# -- gradients -------------------------------------------------------------------------------------


class Passes(nn.Module):
    """The loss of a model's answers, for weights that are not its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        packed = pack(self.model)
        found = find_family(self.model.config).logits(self.model, packed)
        return F.cross_entropy(found.flatten(0, 1), packed.labels_BD.flatten())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_update_added_to_the_weights(name):
    merged = small_causal(name).double().requires_grad_(False)
    if name in EXPERTS:
        merged.set_experts_implementation("eager")  # the grouped product has no float64
    model = copy.deepcopy(merged)
    adapter = randomise(attach(model, LORA, tasks=("a",)).double())
    tensors = {n: t.clone().requires_grad_() for n, t in adapter.inventory.named_tensors()}
    weights = {}
    for site in adapter.sites:
        linear = merged.get_submodule(site.name)
        update = tensors[f"{site.name}.A"][0, 0] @ tensors[f"{site.name}.B"][0, 0] * LORA.scale
        update = update if is_transposed(linear) else update.T
        weights[f"model.{site.name}.weight"] = linear.weight + update
    functional_call(Passes(merged), weights).backward()
    with adapter.slots([0] * len(TASK_IDS)) as slots:
        slots.backward(Passes(model)())
    for parameter in adapter.parameters():  # read them through the names of the linears
        parameter.data = parameter.grad
    found = dict(adapter.inventory.named_tensors())
    assert found.keys() == tensors.keys()
    for tensor_name, tensor in tensors.items():
        largest = tensor.grad.abs().max().item()
        torch.testing.assert_close(
            found[tensor_name], tensor.grad, rtol=0, atol=1e-5 * largest, msg=tensor_name
        )
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_blocks_of_a_lora_are_told_without_its_backbone(tmp_path):
    config = copy.deepcopy(PUBLISHED["the second block"])
    get_peft_model(small_causal("llama"), config).save_pretrained(tmp_path / "stock")
    found = peft_folders.open_adapter(tmp_path / "stock")[1]
    assert (found.config.layout, found.config.blocks) == (("k_proj", "down_proj"), "1")
    config = replace(LORA, layout=("q_proj",), blocks="0")  # which as names alone may be a whole
    model, adapter = adapted("llama", config)
    again = peft_folders.open_adapter(write(adapter, tmp_path / "ours"))[1]
    assert again.config == config
    fresh = small_causal("llama")
    assert torch.equal(native(fresh, attach_copy(fresh, again)), native(model, adapter))
