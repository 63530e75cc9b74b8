"""The published parameter counts on models of T5-XL and T5-XXL shape, without their memory."""

from functools import cache

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites

WIDTHS = {
    "XL": {"d_model": 2048, "num_heads": 32, "d_ff": 5120},
    "XXL": {"d_model": 4096, "num_heads": 64, "d_ff": 10240},
}


@cache
def sites_of(size, layout):
    config = T5Config(
        **WIDTHS[size],
        d_kv=64,
        num_layers=24,
        num_decoder_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return find_sites(make_model(config), layout)


def make_model(config):
    return T5ForConditionalGeneration(config)


def make_adapter(size="XL", *, n_tasks=1, **options):
    config = AdapterConfig(**options)
    names = [str(task) for task in range(n_tasks)]
    with torch.device("meta"):
        return Adapter(config, sites_of(size, config.layout), task_names=names)


def n_inventory(adapter):
    return sum(parameter.numel() for parameter in adapter.inventory.parameters())


@pytest.mark.parametrize(("layout", "count"), [("full", 432), ("light", 192), ("attention", 288)])
def test_number_of_adapted_linears(layout, count):
    assert [len(sites_of(size, layout)) for size in WIDTHS] == [count, count]


@pytest.mark.parametrize(
    ("size", "options", "count"),
    [
        ("XL", {"n_skills": 1}, 2_211_840),
        ("XL", {"n_skills": 8}, 17_694_720),
        ("XL", {"n_skills": 8, "n_splits": 8}, 17_694_720),
        ("XL", {"n_skills": 8, "n_splits": 64}, 17_694_720),
        ("XL", {"n_skills": 1, "rank": 16}, 35_389_440),
        ("XL", {"n_skills": 1, "private": True, "n_tasks": 38}, 84_049_920),
        ("XL", {"n_skills": 1, "layout": "light"}, 933_888),
        ("XL", {"n_skills": 8, "layout": "light"}, 7_471_104),
        ("XL", {"n_skills": 8, "n_splits": 32, "layout": "light"}, 7_471_104),
        ("XL", {"n_skills": 1, "rank": 16, "layout": "light"}, 14_942_208),
        ("XL", {"n_skills": 1, "private": True, "n_tasks": 38, "layout": "light"}, 35_487_744),
        ("XL", {"n_skills": 1, "layout": "attention"}, 1_179_648),
        ("XL", {"n_skills": 1, "rank": 16, "layout": "attention"}, 18_874_368),
        ("XL", {"n_skills": 1, "kind": "ia3", "layout": "light"}, 540_672),
        ("XXL", {"n_skills": 1}, 4_423_680),
        ("XXL", {"n_skills": 8, "n_splits": 64}, 35_389_440),
        ("XXL", {"n_skills": 1, "layout": "light"}, 1_867_776),
        ("XXL", {"n_skills": 1, "layout": "attention"}, 2_359_296),
        ("XXL", {"n_skills": 1, "kind": "ia3", "layout": "light"}, 1_081_344),
    ],
    ids=lambda value: (
        "-".join(f"{name}={option}" for name, option in value.items())
        if isinstance(value, dict)
        else str(value)
    ),
)
def test_number_of_inventory_parameters(size, options, count):
    assert n_inventory(make_adapter(size, **options)) == count


@pytest.mark.parametrize(
    ("size", "granularity", "n_splits", "count"),
    [
        ("XL", "linear", 1, 3_456),
        ("XL", "linear", 64, 221_184),
        ("XXL", "linear", 64, 221_184),
        ("XL", "sublayer", 1, 960),
        ("XL", "sublayer", 64, 61_440),
        ("XL", "block", 1, 384),
        ("XL", "block", 64, 24_576),
        ("XL", "blocks", 64, 3_072),
        ("XL", "stack", 1, 16),
        ("XL", "stack", 64, 1_024),
        ("XL", "model", 1, 8),
        ("XL", "model", 64, 512),
    ],
)
def test_number_of_routing_logits_per_task(size, granularity, n_splits, count):
    span = 8 if granularity == "blocks" else 1
    adapter = make_adapter(size, granularity=granularity, block_span=span, n_splits=n_splits)
    assert adapter.routing_logits.numel() == count


@pytest.mark.parametrize(
    ("layout", "n_splits", "count"),
    [("attention", 32, 73_728), ("attention", 64, 147_456), ("light", 32, 49_152)],
)
def test_number_of_routing_logits_of_smaller_layouts(layout, n_splits, count):
    assert make_adapter(layout=layout, n_splits=n_splits).routing_logits.numel() == count


@pytest.mark.parametrize(
    ("granularity", "span", "count"),
    [
        ("linear", 1, 432),
        ("sublayer", 1, 120),
        ("block", 1, 48),
        ("blocks", 8, 6),
        ("stack", 1, 2),
        ("model", 1, 1),
    ],
)
def test_number_of_routing_groups(granularity, span, count):
    assert len(make_adapter(granularity=granularity, block_span=span).groups) == count


def test_routing_has_a_row_per_task():
    assert make_adapter(n_splits=64, n_tasks=313).routing_logits.shape == (313, 432, 64, 8)


def test_an_adapter_made_on_the_meta_device_holds_no_memory():
    assert all(parameter.is_meta for parameter in make_adapter(n_splits=64).parameters())
