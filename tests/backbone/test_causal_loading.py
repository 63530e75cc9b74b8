"""Decoder-only backbones in every layout of the hub compute what transformers computes."""

import json

import pytest
import torch
import transformers
from causal_folders import SEEING, small_seeing, write_causal
from safetensors.torch import load_file, save_file
from small_causal import FAMILIES, SIZES, furthest, packed_logits, plain_logits, small_causal

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.exchange import stock
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.stored_names import map_names

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def _no_bars():
    transformers.utils.logging.disable_progress_bar()


def tensors_in(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def rewrite(folder, tensors):
    """The folder with other tensors, and each in memory of its own."""
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors")


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same(build, folder, expected=None):
    ours = packed_logits(build(name=str(folder)), CAUSAL)
    assert furthest(ours, plain_logits(expected or plain(folder))) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_plain_load(tmp_path, build, family):
    assert_same(build, write_causal(tmp_path, family))


# -- names ----------------------------------------------------------------------------------------


def masks(name, *, dtype=torch.uint8):
    return {name.format(block): torch.ones(1, 1, 8, 8, dtype=dtype) for block in range(2)}


#: Changes of a checkpoint that leave the model as it is, by the family they are done to.
AS_STORED = {
    "gpt2 without its prefix": (
        "gpt2",
        lambda t: (
            {n.removeprefix("transformer."): x for n, x in t.items()} | masks("h.{}.attn.bias")
        ),
    ),
    "gpt2 with its head": ("gpt2", lambda t: t | {HEAD: t["transformer.wte.weight"]}),
    "opt without its prefix": (
        "opt",
        lambda t: {n.removeprefix("model."): x for n, x in t.items()},
    ),
    "llama without its prefix": (
        "llama tied",
        lambda t: {n.removeprefix("model."): x for n, x in t.items()},
    ),
    "neox with masks": (
        "neox",
        lambda t: (
            t
            | masks("gpt_neox.layers.{}.attention.bias", dtype=torch.bool)
            | {"gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9)}
        ),
    ),
    "llama with frequencies": (
        "llama",
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    ),
    "float16": ("qwen3 moe", lambda t: {n: x.half() for n, x in t.items()}),
    "bfloat16": ("mixtral", lambda t: {n: x.bfloat16() for n, x in t.items()}),
    "tied, the head alone": (
        "llama tied",
        lambda t: {HEAD if n == EMBEDDING else n: x for n, x in t.items()},
    ),
    "tied, an equal head": ("llama tied", lambda t: t | {HEAD: t[EMBEDDING]}),
    "said to be tied, another head": ("llama tied", lambda t: t | {HEAD: t[EMBEDDING].flip(0)}),
}


@pytest.mark.parametrize("what", AS_STORED)
def test_a_checkpoint_of_another_layout_is_read_alike(tmp_path, build, what):
    family, change = AS_STORED[what]
    folder = write_causal(tmp_path, family)
    rewrite(folder, change(tensors_in(folder)))
    assert_same(build, folder)


@pytest.mark.parametrize("family", ["qwen3 moe", "mixtral"])
def test_experts_are_read_apart_or_together_and_from_shards(tmp_path, build, family):
    model = small_causal(family)
    model.save_pretrained(tmp_path / "apart", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "together", save_original_format=False)
    assert len(list((tmp_path / "apart").glob("*.safetensors"))) > 4
    for folder in ("apart", "together"):
        assert_same(build, tmp_path / folder, model)


def test_an_expert_is_read_without_the_others(tmp_path):
    source = read_blueprint(BackboneConfig(name=str(write_causal(tmp_path, "qwen3 moe")))).source
    name, stored = "model.layers.1.mlp.experts.gate_up_proj", tensors_in(tmp_path)
    whole = source.read(name, 0, 4 * 48 * 32).reshape(source.shape(name))
    for expert in range(4):
        parts = [
            stored[f"model.layers.1.mlp.experts.{expert}.{side}_proj.weight"]
            for side in ("gate", "up")
        ]
        assert torch.equal(whole[expert], torch.cat(parts))
    start, stop = 48 * 32 + 7, 3 * 48 * 32 - 5
    assert torch.equal(source.read(name, start, stop), whole.reshape(-1)[start:stop])


# -- models that see ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("kind", SEEING)
def test_the_text_model_of_one_that_sees_is_used(tmp_path, build, kind, is_old):
    seeing = small_seeing(kind)
    seeing.save_pretrained(tmp_path, save_original_format=is_old)
    blueprint = read_blueprint(BackboneConfig(name=str(tmp_path)))
    assert any("vision" in name for name in blueprint.arrangement.unused)
    assert not any("vision" in name for name in blueprint.source.names())
    assert_same(build, tmp_path, seeing)


def test_a_text_model_of_one_that_sees_is_fine_tuned_where_it_is_mapped(tmp_path):
    seeing = small_seeing("gemma3")
    seeing.save_pretrained(tmp_path)
    mapped = BackboneConfig(name=str(tmp_path), dtype="float32")
    model = stock.load_backbone(mapped, read_blueprint(mapped), torch.device("cpu"))
    assert furthest(plain_logits(model), plain_logits(seeing)) < 1e-5
    cast = BackboneConfig(name=str(tmp_path), dtype="bfloat16")
    with pytest.raises(BackboneError, match=r"does not load alone; convert it first"):
        stock.load_backbone(cast, read_blueprint(cast), torch.device("cpu"))


# -- ends of sequence -----------------------------------------------------------------------------


def test_ends_of_sequence_are_those_of_both_files(tmp_path):
    folder = write_causal(tmp_path, "llama")
    config = BackboneConfig(name=str(folder))
    assert read_blueprint(config).model_config.eos_token_id == 2
    edit(folder / "generation_config.json", eos_token_id=[7, 2, 5])
    assert read_blueprint(config).model_config.eos_token_id == [2, 7, 5]
    edit(folder / "config.json", eos_token_id=[9, 7])
    assert read_blueprint(config).model_config.eos_token_id == [9, 7, 2, 5]


# -- refusals -------------------------------------------------------------------------------------


def without(part):
    return lambda tensors: {n: t for n, t in tensors.items() if part not in n}


NARROW = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
REFUSED = [
    ("llama", without(HEAD), "missing lm_head.weight"),
    ("qwen3 moe", without("1.mlp.experts.2.up"), r"only some parts of model\.layers\.1\.mlp"),
    ("qwen3 moe", without("1.mlp.experts.3."), r"is \[3, 48, 32\], the model wants \[4, 48"),
    ("mixtral", lambda t: t | {NARROW: torch.ones(48, 31)}, r"w1\.weight is \[48, 31\], and"),
    ("gpt2", lambda t: t | {"wte.weight": torch.ones(1)}, "more than once, as .* and wte.weight"),
    ("llama", lambda t: t | {"model.layers.7.x": torch.ones(2)}, r"unknown model\.layers\.7\.x"),
]


@pytest.mark.parametrize(("family", "change", "fault"), REFUSED)
def test_what_does_not_make_the_model_is_refused(tmp_path, build, family, change, fault):
    folder = write_causal(tmp_path, family)
    rewrite(folder, change(tensors_in(folder)))
    with pytest.raises(BackboneError, match=fault) as caught:
        build(name=str(folder))
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_conversion_that_is_no_joining_is_refused_by_name():
    config = transformers.AutoConfig.for_model("hrm_text", **SIZES)
    with torch.device("meta"):
        model = CAUSAL.build(config)
    stored = ["model.L_module.layers.0.mlp.gate_up_proj.weight"]
    with pytest.raises(BackboneError, match=r"converted by Chunk\(dim=0\), which is not done here"):
        map_names(model, stored)
