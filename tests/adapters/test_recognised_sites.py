"""Sites without a backbone: the layout they are of, told from their names and widths."""

import pytest
from peft_folders import GATED, UNGATED
from tiny import make_t5

from mhr_scale.adapters import find_sites
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.sites import recognise_sites
from mhr_scale.errors import LayoutError


@pytest.mark.parametrize("backbone", [GATED, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize("layout", ["full", "light", "attention"])
def test_sites_are_recognised_by_name_in_the_order_of_the_model(layout, backbone):
    sites = find_sites(make_t5(num_layers=3, **backbone), layout)
    widths = {s.name: (s.in_features, s.out_features) for s in reversed(sites)}
    assert recognise_sites(widths) == (Layout(layout), sites)


@pytest.mark.parametrize(
    ("drop", "count"),
    [
        ("encoder.block.1.", 3),
        ("decoder.block.0", 5),
        (".block.1.layer.1.EncDecAttention.v", 1),
    ],
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
