"""Layouts by the names of linears and by blocks: what they match, say and keep, and refuse."""

import pytest
import torch
from small_causal import small_causal
from test_causal_adapters import native
from tiny import TASKS, attach_copy, logits, make_adapted, make_t5, randomise

from mhr_scale import AdapterConfig, attach, average, load_adapter, save_adapter
from mhr_scale.adapters import find_sites
from mhr_scale.adapters.config import block_numbers, block_ranges
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.sites import recognise_sites
from mhr_scale.errors import AdapterError, ConfigError, LayoutError
from mhr_scale.families.table import shorten

CONFIG = AdapterConfig(
    layout=("q_proj", "v_proj"), blocks="1-2", rank=2, n_skills=3, n_splits=4, granularity="block"
)


def llama():
    return small_causal("llama", num_hidden_layers=4)


def names(model, layout, blocks="all"):
    return [site.name for site in find_sites(model, layout, blocks)]


# -- what they match -------------------------------------------------------------------------------


def test_names_and_blocks_are_matched_in_the_order_of_the_model():
    found = names(llama(), ["v_proj", "q_proj"], "0,2-3")
    expected = [
        f"model.layers.{n}.self_attn.{kind}" for n in (0, 2, 3) for kind in ("q_proj", "v_proj")
    ]
    assert found == expected


def test_a_longer_end_tells_two_linears_of_one_name_apart():
    model = small_causal("gpt2")
    assert names(model, ["c_proj"], "0") == [
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_proj",
    ]
    assert names(model, ["mlp.c_proj"], "0") == ["transformer.h.0.mlp.c_proj"]


def test_blocks_of_both_stacks_are_meant_and_names_of_one_alone_may_be():
    model = make_t5(num_layers=3, num_decoder_layers=2)
    assert names(model, ["EncDecAttention.q"], "1") == [
        "decoder.block.1.layer.1.EncDecAttention.q",
    ]
    assert len(names(model, ["q", "v"], "0-1")) == 2 * 2 + 2 * 4


@pytest.mark.parametrize("layout", [("q_proj",), ("k_proj", "down_proj"), "light"])
@pytest.mark.parametrize("blocks", ["all", "0-1", "1,3"])
def test_a_layout_is_told_from_the_names_of_its_linears(layout, blocks):
    sites = find_sites(llama(), layout, blocks)
    widths = {site.name: (site.in_features, site.out_features) for site in reversed(sites)}
    known = None if "3" in blocks else blocks  # else the blocks behind the last one are not told
    found, again = recognise_sites(widths, blocks=known)
    assert again == sites
    assert found == Layout(layout, blocks)


def test_numbers_of_blocks_are_written_as_they_are_read():
    for text in ("0", "0-3", "0-1,3,7-9"):
        assert block_ranges(block_numbers(text)) == text
    assert AdapterConfig(blocks=3).blocks == "3"  # as YAML reads it


# -- what is kept ----------------------------------------------------------------------------------


def test_an_adapter_is_saved_and_loaded_with_its_layout(tmp_path):
    model = llama()
    adapter = randomise(attach(model, CONFIG, tasks=TASKS))
    expected = native(model, adapter)
    save_adapter(adapter, tmp_path)
    fresh = llama()
    loaded = load_adapter(tmp_path, model=fresh)
    assert loaded.config == CONFIG
    assert torch.equal(native(fresh, loaded), expected)
    assert average(loaded).config.blocks == "1-2"


def test_routing_is_shared_within_the_blocks_that_have_adapters():
    assert attach(llama(), CONFIG, tasks=TASKS).groups == ("decoder.block.1", "decoder.block.2")


def test_an_adapter_of_another_depth_or_of_other_names_is_refused(tmp_path):
    save_adapter(attach(llama(), CONFIG, tasks=TASKS), tmp_path)
    with pytest.raises(AdapterError, match=r"another backbone: adapter\.blocks: '1-2' names block"):
        load_adapter(tmp_path, model=small_causal("llama"))
    with pytest.raises(AdapterError, match=r"another backbone: .* no linear .* called 'q_proj'"):
        load_adapter(tmp_path, model=small_causal("gpt2", n_layer=4))


def test_pictures_have_short_names():
    found = shorten([*names(small_causal("neox"), ["query_key_value"]), *names(llama(), "light")])
    assert found[:4] == ["dec.0.query_key_value", "dec.1.query_key_value", "dec.0.k", "dec.0.v"]


def test_an_adapter_of_some_blocks_trains_and_the_others_are_the_backbone_s():
    model, adapter = make_adapted(AdapterConfig(layout=("q", "v"), blocks="1"), dtype=torch.float32)
    assert not torch.equal(logits(model, adapter, [0, 1]), logits(model, adapter, [1, 0]))
    again = attach_copy(make_t5().train(), adapter)
    assert again.sites == adapter.sites


# -- what is refused -------------------------------------------------------------------------------


def experts(**changes):
    return small_causal("qwen3 moe", **changes)


@pytest.mark.parametrize(
    ("model", "layout", "blocks", "words"),
    [
        (llama, ["q_prj"], "all", "no linear of the blocks is called 'q_prj'.*mean 'q_proj'"),
        (
            llama,
            ["q_proj", "wo"],
            "all",
            "no linear of the blocks is called 'wo'; they have q_proj",
        ),
        (llama, "q_proj", "all", r"'q_proj' is unknown .*mean the list \[q_proj\]"),
        (llama, "atention", "all", "'atention' is unknown .*mean 'attention'"),
        (llama, "mlp", "all", "'mlp' is unknown .*attention, or a list of names of linears"),
        (llama, "full", "2-9", "'2-9' names block 4, and model.layers has 4 blocks, from 0 to 3"),
        (experts, ["down_proj"], "all", r"'down_proj' is of experts \(mlp.experts.down_proj in"),
        (experts, ["experts"], "all", r"'experts' is of experts \(mlp.experts.gate_up_proj in"),
        (
            lambda: experts(mlp_only_layers=[0]),
            ["q_proj", "gate_proj"],
            "all",
            r"'gate_proj' is of some blocks, or beside experts \(mlp.gate_proj in model.layers\)",
        ),
        (make_t5, ["q_proj"], "all", "no linear of the blocks is called 'q_proj'; they have q, k"),
        (lambda: make_t5(num_layers=3), "light", "2", "and decoder.block has 2 blocks, from 0"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 9 else "",
)
def test_what_is_not_there_is_refused_in_one_line(model, layout, blocks, words):
    with pytest.raises(LayoutError, match=words) as error:
        find_sites(model(), layout, blocks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": ()}, "adapter.layout: names no linear"),
        ({"layout": ["q_proj", ""]}, "adapter.layout: names no linear"),
        ({"blocks": "3-1"}, "adapter.blocks: '3-1' is neither 'all' nor numbers"),
        ({"blocks": ""}, "adapter.blocks: '' is neither"),
        ({"blocks": "1,,2"}, "adapter.blocks: '1,,2' is neither"),
        ({"blocks": -1}, "adapter.blocks: '-1' is neither"),
    ],
)
def test_settings_that_name_nothing_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        AdapterConfig(**settings)
