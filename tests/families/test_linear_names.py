"""What a linear is, told by its name below a block."""

import random

import pytest

from mhr_scale.families import linear_names
from mhr_scale.families.linear_names import (
    in_layout,
    in_order,
    is_complete,
    is_of_experts,
    part_of,
    role_of,
)

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LLAMA = (*(f"self_attn.{one}_proj" for one in "qkvo"), *GATED)
PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
NEOX = (
    *("attention.query_key_value", "attention.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
OPT = (*(f"self_attn.{one}_proj" for one in "qkv"), "self_attn.out_proj", "fc1", "fc2")
CROSS = (*LLAMA, *(f"cross_attn.{one}_proj" for one in "qkvo"))
BLOCKS = {"llama": LLAMA, "phi3": PHI3, "neox": NEOX, "gpt2": GPT2, "opt": OPT, "cross": CROSS}


@pytest.mark.parametrize(
    ("name", "part", "role"),
    [
        ("self_attn.q_proj", "attention", "query"),
        ("attn.c_proj", "attention", "output"),
        ("mlp.c_proj", "feed_forward", "down"),
        ("self_attention.query_key_value", "attention", "query_key_value"),
        ("self_attention.dense", "attention", "output"),
        ("attn.attention.k_proj", "attention", "key"),
        ("mlp.gate_up_proj", "feed_forward", "gate_up"),
        ("fc1", "feed_forward", "up"),
        ("cross_attn.v_proj", "cross_attention", "value"),
        ("encoder_attention_cross.v_proj", "cross_attention", "value"),
        ("self_attn.sinks_proj", "attention", None),
        ("mlp.q_proj", "feed_forward", None),
    ],
)
def test_part_and_role_follow_from_the_name(name, part, role):
    assert (part_of(name), role_of(name)) == (part, role)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_order_is_that_of_the_computation_whatever_comes_in(block):
    for seed in range(5):
        shuffled = random.Random(seed).sample(BLOCKS[block], len(BLOCKS[block]))
        assert in_order([*shuffled, shuffled[0]]) == BLOCKS[block]


def test_a_linear_of_no_known_role_comes_last_in_its_part():
    names = ("self_attn.a_proj", "self_attn.o_proj", "mlp.b_proj", "mlp.up_proj")
    assert in_order(names) == (names[1], names[0], names[3], names[2])


LIGHT = {
    "llama": ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
    "neox": ("attention.query_key_value", "mlp.dense_h_to_4h"),
    "gpt2": ("attn.c_attn", "mlp.c_fc"),
    "opt": ("self_attn.k_proj", "self_attn.v_proj", "fc1"),
}


@pytest.mark.parametrize("block", LIGHT)
def test_named_layouts_take_the_same_roles_everywhere(block):
    names = BLOCKS[block]
    attention = tuple(name for name in names if "att" in name)
    assert in_layout("full", names) == names
    assert in_layout("attention", names) == attention
    assert in_layout("light", names) == LIGHT[block]


@pytest.mark.parametrize("layout", ["full", "light", "attention"])
@pytest.mark.parametrize("block", LIGHT)
def test_a_layout_is_complete_with_all_its_linears_only(block, layout):
    names = in_layout(layout, BLOCKS[block])
    assert is_complete(layout, names)
    for left_out in names:
        if role_of(left_out) == "gate":  # a feed-forward without a gate is one too
            continue
        rest = [name for name in names if name != left_out]
        assert not is_complete(layout, rest), left_out


def test_experts_are_told_by_any_part_of_the_name():
    assert is_of_experts("mlp.experts.gate_up_proj")
    assert is_of_experts("mlp.shared_expert.up_proj")
    assert not any(is_of_experts(name) for names in BLOCKS.values() for name in names)


def test_no_name_has_two_roles_in_one_part():
    for roles in (linear_names.ATTENTION_ROLES, linear_names.FEED_FORWARD_ROLES):
        listed = [name for names in roles.values() for name in names]
        assert len(listed) == len(set(listed))
