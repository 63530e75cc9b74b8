"""Which linears a layout wraps, which of them share routing, and what does not fit."""

import pytest
import torch
from tiny import TASKS, make_t5
from torch import nn

from mhr_scale.adapters import AdapterConfig, attach, find_sites
from mhr_scale.errors import LayoutError

GATED = {"feed_forward_proj": "gated-gelu"}
UNGATED = {"feed_forward_proj": "relu"}


@pytest.mark.parametrize(
    ("changes", "layout", "count"),
    [
        # 3 encoder blocks of 1 attention, 2 decoder blocks of 2
        (GATED, "full", 3 * (4 + 3) + 2 * (8 + 3)),
        (GATED, "light", 3 * (2 + 1) + 2 * (4 + 1)),
        (GATED, "attention", 3 * 4 + 2 * 8),
        (UNGATED, "full", 3 * (4 + 2) + 2 * (8 + 2)),
        (UNGATED, "light", 3 * (2 + 1) + 2 * (4 + 1)),
        (UNGATED, "attention", 3 * 4 + 2 * 8),
    ],
)
def test_a_layout_finds_the_expected_number_of_linears(changes, layout, count):
    assert len(find_sites(make_t5(num_layers=3, **changes), layout)) == count


@pytest.mark.parametrize(
    ("changes", "layout", "names"),
    [
        (GATED, "full", {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}),
        (GATED, "light", {"k", "v", "wi_1"}),
        (GATED, "attention", {"q", "k", "v", "o"}),
        (UNGATED, "full", {"q", "k", "v", "o", "wi", "wo"}),
        (UNGATED, "light", {"k", "v", "wi"}),
        (UNGATED, "attention", {"q", "k", "v", "o"}),
    ],
)
def test_a_layout_finds_the_linears_it_names(changes, layout, names):
    sites = find_sites(make_t5(**changes), layout)
    assert {site.name.rpartition(".")[2] for site in sites} == names


def test_a_site_knows_where_it_sits_and_its_widths():
    sites = {site.name: site for site in find_sites(make_t5(), "full")}
    site = sites["decoder.block.1.layer.2.DenseReluDense.wo"]
    assert (site.stack, site.block, site.sublayer) == ("decoder", 1, 2)
    assert (site.in_features, site.out_features) == (48, 32)


def test_an_mt5_has_the_layouts_of_t5():
    model = make_t5()
    model.config.model_type = "mt5"
    assert len(find_sites(model, "light")) == 3 * 2 + 5 * 2


def test_an_unknown_layout_lists_the_known_ones_and_suggests_one():
    with pytest.raises(LayoutError) as caught:
        find_sites(make_t5(), "lihgt")
    assert "known: full, light, attention; did you mean 'light'?" in str(caught.value)


def test_an_unknown_backbone_lists_the_known_types():
    model = make_t5()
    model.config.model_type = "bart"  # which also is what a decoder alone is called
    with pytest.raises(LayoutError, match=r"type 'bart'; known types: t5, mt5, umt5, "):
        find_sites(model, "full")


def rename_values(model):
    for module in list(model.modules()):
        if hasattr(module, "v"):
            module.value = module.v
            del module.v


def drop_one(model):
    model.encoder.block[0].layer[1].DenseReluDense.wo = nn.Identity()


def hide_all(model):
    model.encoder.blocks, model.decoder.blocks = model.encoder.block, model.decoder.block
    del model.encoder.block, model.decoder.block


@pytest.mark.parametrize(("change", "found"), [(rename_values, 30), (drop_one, 35), (hide_all, 0)])
def test_linears_that_are_missing_name_the_family_and_both_counts(change, found):
    model = make_t5()
    change(model)
    with pytest.raises(LayoutError) as caught:
        find_sites(model, "full")
    assert (
        f"layout 'full' matches {found} linears of a T5 v1.1 (gated: LM-adapt, T0, FLAN, mT5, "
        "umT5) model with 2+2 blocks, expected 36"
    ) in str(caught.value)


def test_missing_linears_leave_the_model_as_it_was():
    model = make_t5()
    drop_one(model)
    with pytest.raises(LayoutError):
        attach(model, AdapterConfig(), tasks=TASKS)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("n_splits", "message"),
    [
        (5, "5 does not divide the input width 32 of encoder.block.0.layer.0.SelfAttention.q"),
        (5, "use a divisor such as 2 or 4"),
        (32, "32 does not divide the output width 48 of encoder.block.0.layer.1.DenseReluDense"),
        (32, "use a divisor such as 16 or 24"),
    ],
)
def test_splits_that_divide_no_width_name_the_linear_and_divisors(n_splits, message):
    config = AdapterConfig(n_splits=n_splits)
    with pytest.raises(LayoutError) as caught:
        attach(make_t5(), config, tasks=TASKS)
    assert message in str(caught.value)


def test_ia3_splits_only_the_output():
    config = AdapterConfig(kind="ia3", layout="light", n_splits=4)
    adapter = attach(make_t5(d_model=30), config, tasks=TASKS)
    assert adapter.config.n_splits == 4


@pytest.mark.parametrize(
    ("granularity", "span", "groups"),
    [
        ("linear", 1, 36),
        ("sublayer", 1, 10),
        ("block", 1, 4),
        ("blocks", 2, 2),
        ("stack", 1, 2),
        ("model", 1, 1),
    ],
)
def test_granularity_says_how_many_routing_tables_there_are(granularity, span, groups):
    config = AdapterConfig(granularity=granularity, block_span=span)
    adapter = attach(make_t5(), config, tasks=TASKS)
    assert adapter.routing_logits.shape == (len(TASKS), groups, 1, 8)


@pytest.mark.parametrize(
    ("granularity", "span", "group"),
    [
        ("linear", 1, "decoder.block.5.layer.1.EncDecAttention.k"),
        ("sublayer", 1, "decoder.block.5.layer.1"),
        ("block", 1, "decoder.block.5"),
        ("blocks", 4, "decoder.blocks.4"),
        ("blocks", 6, "decoder.blocks.0"),
        ("stack", 1, "decoder"),
        ("model", 1, "model"),
    ],
)
def test_a_linear_reads_the_table_of_its_group(granularity, span, group):
    with torch.device("meta"):
        sites = {site.name: site for site in find_sites(make_t5(num_decoder_layers=6), "full")}
    site = sites["decoder.block.5.layer.1.EncDecAttention.k"]
    assert site.routing_group(granularity, span) == group


def test_sharing_tables_equals_equal_tables_of_single_linears():
    shared = attach(make_t5(), AdapterConfig(granularity="stack", n_skills=2), tasks=TASKS)
    single = attach(make_t5(), AdapterConfig(granularity="linear", n_skills=2), tasks=TASKS)
    shared.routing_logits.data.normal_(generator=torch.Generator().manual_seed(1))
    for number, site in enumerate(single.sites):
        group = shared.groups.index(site.stack)
        single.routing_logits.data[:, number] = shared.routing_logits.data[:, group]
    slots = []
    for adapter in (shared, single):
        for parameter in adapter.inventory.parameters():
            parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        with adapter.slots([2, 0]):
            slots.append([(linear.slots.a_UIX, linear.slots.b_URO) for linear in adapter.linears])
    torch.testing.assert_close(slots[0], slots[1], rtol=1e-6, atol=1e-6)
