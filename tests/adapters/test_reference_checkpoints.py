"""Checkpoints of the reference implementation: its own numbers, its names, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golden_vectors import files, read
from published import KEY, MHR, TABLE, assert_same, make, publish, store
from safetensors.torch import save_file
from tiny import TASKS, attach_copy
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.adapters import AdapterConfig, peft_folders
from mhr_scale.adapters.reference_checkpoints import GRANULARITIES, read_published
from mhr_scale.errors import AdapterError

# --- the reference's own numbers


@pytest.fixture(params=files("model_*.safetensors"), ids=lambda path: path.stem, scope="module")
def golden(request) -> SimpleNamespace:
    return read(request.param)


def part_of(golden, prefix):
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in golden.tensors.items() if k.startswith(start)}


def golden_logits(golden, adapter):
    """Logits of the golden backbone with a copy of `adapter` on the last batch."""
    model = T5ForConditionalGeneration(T5Config(**golden.meta["backbone_config"])).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert not model.load_state_dict(part_of(golden, "backbone"), strict=False).unexpected_keys
    batch = part_of(golden, f"batch{golden.meta['training']['total_steps']}")
    task_ids = batch.pop("task_ids")
    with torch.no_grad(), attach_copy(model, adapter).slots(task_ids):
        return model(**batch).logits


@pytest.mark.parametrize(
    ("tensors", "numbers", "form"),
    [("adapter", "eval", "ckpt"), ("final", "final_eval", "safetensors")],
)
def test_a_published_checkpoint_gives_the_logits_of_the_reference(
    tensors, numbers, form, golden, tmp_path
):
    found = part_of(golden, tensors)
    path = tmp_path / "model.safetensors"
    if form == "ckpt":
        path = store(found, tmp_path, lora_alpha=golden.meta["alpha"])
    else:
        save_file(found, path)
    adapter = read_published(path)
    logits, expected = golden_logits(golden, adapter), golden.tensors[f"{numbers}.logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_setting_and_shapes_are_found(golden, tmp_path):
    config = read_published(store(part_of(golden, "adapter"), tmp_path)).config
    names = {"standard": "full", "light": "light", "finegrained": "linear", "blockwise": "block"}
    assert config == AdapterConfig(
        layout=names[golden.meta["layout"]],
        granularity=names[golden.meta["granularity"]],
        rank=golden.meta["rank"],
        alpha=float(golden.meta["alpha"]),
        n_skills=golden.meta["skills"],
        n_splits=golden.meta["heads"],
    )


# --- its forms


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_is_found(granularity, tmp_path):
    adapter = make(replace(MHR, granularity=granularity))
    for everywhere in (False, True):
        found = read_published(store(publish(adapter, everywhere=everywhere), tmp_path))
        assert (found.config, found.sites) == (adapter.config, adapter.sites)
        assert_same(found, adapter)


@pytest.mark.parametrize(
    "config",
    [
        replace(MHR, n_splits=1, layout="attention"),
        replace(MHR, layout="light"),
        AdapterConfig(n_skills=1, rank=2),
        AdapterConfig(kind="ia3", layout="light", n_skills=1),
        AdapterConfig(kind="ia3", n_skills=1),
    ],
    ids=["Poly", "light MHR", "LoRA", "(IA)3", "full (IA)3"],
)
def test_every_method_comes_back_bit_for_bit(config, tmp_path):
    adapter = make(config)
    path = store(publish(adapter), tmp_path)
    found = read_published(path, width=32 if config.layout == "light" else None)
    assert (found.config, found.sites) == (config, adapter.sites)
    assert_same(found, adapter)


def test_tasks_are_numbered_unless_they_are_named(tmp_path):
    path = store(publish(make(MHR)), tmp_path)
    assert read_published(path).task_names == ("task_0", "task_1", "task_2", "task_3")
    assert read_published(path, task_names=TASKS).task_names == TASKS


def test_alpha_comes_from_the_hyper_parameters_unless_it_is_given(tmp_path):
    path = store(publish(make(MHR)), tmp_path, lora_alpha=16)
    assert read_published(path).config.alpha == 16.0
    assert read_published(path, alpha=2.0).config.alpha == 2.0


def test_noise_of_the_router_is_read_from_the_hyper_parameters(tmp_path):
    path = store(publish(make(MHR)), tmp_path, module_logits_relaxed_bernoulli=True)
    assert read_published(path).config.policy == "noisy"


@pytest.mark.parametrize("stored", ["nothing", "constants"])
def test_an_inventory_without_learned_routing_is_uniform(stored, tmp_path):
    adapter = make(replace(MHR, policy="uniform"))
    tensors = publish(adapter)
    if stored == "constants":
        tensors |= {f"{site.name}.{TABLE}": torch.full((4, 3), 1 / 3) for site in adapter.sites}
    found = read_published(store(tensors, tmp_path))
    assert found.config == adapter.config
    assert_same(found, adapter)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_bare_tensors_stored_by_torch_are_read(suffix, tmp_path):
    adapter = make(MHR)
    path = tmp_path / f"adapter{suffix}"
    torch.save(publish(adapter), path)
    card, found = peft_folders.open_adapter(path)
    assert_same(found, adapter)
    assert (card.backbone, card.origin["format"]) == ({}, "published checkpoint")


# --- what is refused


def drop(tensors):
    del tensors[f"{KEY}.lora_a"]


def drop_table(tensors):
    del tensors[f"{KEY}.{TABLE}"]


def drop_linear(tensors):
    for name in [name for name in tensors if name.startswith(KEY)]:
        del tensors[name]


def reshape(tensors):
    tensors[f"{KEY}.lora_b"] = torch.zeros(4, 3, 2, 9)


def add(tensors):
    tensors["decoder.block.7.layer.0.SelfAttention.k.lora_a"] = torch.zeros(4, 3, 8, 2)


def add_weights(tensors):
    tensors["shared.weight"] = torch.zeros(3)


def poison(tensors):
    tensors[f"{KEY}.{TABLE}"][0, 0] = float("nan")


def retable(tensors):
    tensors[f"{KEY}.{TABLE}"] = torch.zeros(4, 13)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, f"missing {KEY}.A"),
        (drop_table, f"tables fit no granularity .* linears without one: {KEY}"),
        (drop_linear, f"nearest is 'full', with 1 odd: missing {KEY}"),
        (reshape, rf"{KEY}.B is \[4, 3, 2, 9\], not \[4, 3, 2, 8\]"),
        (add, "with 1 odd: unknown decoder.block.7"),
        (add_weights, "1 of 109 tensors are not named .* such as model.shared.weight; keep"),
        (poison, f"{KEY}.routing_logits holds NaN"),
        (retable, rf"{KEY}.routing_logits is \[4, 13\], not \[4, 4, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, words, tmp_path):
    tensors = publish(make(MHR))
    change(tensors)
    with pytest.raises(AdapterError, match=words) as error:
        read_published(store(tensors, tmp_path))
    assert str(error.value).startswith(str(tmp_path / "best.ckpt"))


def test_tables_of_linears_without_an_adapter_are_refused(tmp_path):
    tensors = publish(make(replace(MHR, layout="light")))
    tensors[f"{KEY[:-1]}q.{TABLE}"] = torch.zeros(4, 12)
    with pytest.raises(AdapterError, match=rf"unknown {KEY[:-1]}q.routing_logits"):
        read_published(store(tensors, tmp_path))


def test_two_sets_of_tensors_in_one_file_are_refused(tmp_path):
    tensors = publish(make(MHR))
    both = {f"{part}.{name}": tensor for name, tensor in tensors.items() for part in ("a", "b")}
    with pytest.raises(AdapterError, match=r"under 2 prefixes \['model.a.', 'model.b.'\], not one"):
        read_published(store(both, tmp_path))


def test_another_number_of_task_names_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="2 task names for 4 routing rows"):
        read_published(store(publish(make(MHR)), tmp_path), task_names=["a", "b"])


def test_ia3_vectors_of_a_backbone_of_unknown_width_are_refused(tmp_path):
    adapter = make(AdapterConfig(kind="ia3", layout="light", n_skills=1))
    with pytest.raises(AdapterError, match="or pass width"):
        read_published(store(publish(adapter), tmp_path))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"module_logits_l2_norm": True}, "module_logits_l2_norm: not supported"),
        ({"module_logits_straight_through": True}, "module_logits_straight_through"),
        ({"poly_average_correction": True}, "poly_average_correction"),
        ({"poly_use_shared_skill": True}, "poly_use_shared_skill"),
        ({"router_selector": "private"}, "router_selector: private"),
    ],
)
def test_another_way_of_mixing_is_refused(setting, words, tmp_path):
    with pytest.raises(AdapterError, match=words):
        read_published(store(publish(make(MHR)), tmp_path, **setting))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": "16"}, "hyper-parameter lora_alpha is '16', not a number"),
        ([("lora_alpha", 16)], "hyper_parameters are a list, not settings by name"),
    ],
)
def test_hyper_parameters_of_other_types_are_refused(settings, words, tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": publish(make(MHR)), "hyper_parameters": settings}, path)
    with pytest.raises(AdapterError, match=words):
        read_published(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_held_in_float32_and_said(dtype, tmp_path):
    adapter = make(MHR)
    path = store({name: t.to(dtype) for name, t in publish(adapter).items()}, tmp_path)
    card, found = peft_folders.open_adapter(path)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert_same(found, adapter.to(dtype).float())
    assert card.precision == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_no_adapter_has_are_refused(dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in publish(make(MHR)).items()}
    with pytest.raises(AdapterError, match=r"is \w+; adapters are float32, bfloat16, float16"):
        read_published(store(tensors, tmp_path))


class Code:
    """Something that only pickle can store."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {}, "hyper_parameters": Code()}, "cannot be read as tensors alone"),
        ([1, 2], "holds no state_dict"),
        ({"step": 3}, "holds no state_dict"),
        (b"not a checkpoint", "cannot be read as tensors alone"),
        (None, "cannot be read as tensors alone"),
    ],
    ids=["code", "list", "numbers", "bytes", "missing"],
)
def test_a_file_without_plain_tensors_is_refused(content, words, tmp_path):
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(AdapterError, match=words):
        read_published(path)


def test_a_broken_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"broken")
    with pytest.raises(AdapterError, match="not a safetensors file"):
        read_published(path)
