"""What the linears of a block are, told by their names: the part, the role, the order.

Libraries call the same linear differently (`k_proj`, `key`), some hold several in one
(`query_key_value`, `gate_up_proj`), and two of GPT-2's are called `c_proj`. A name is that below
the block: `self_attn.k_proj`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

Part = Literal["attention", "feed_forward", "cross_attention"]
#: The parts of a block by their number; a block without cross-attention has the first two.
PARTS: tuple[Part, ...] = ("attention", "feed_forward", "cross_attention")

#: Last parts of the names of attention's linears by their role, in the order of the computation.
ATTENTION_ROLES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "query", "wq"),
    "key": ("k_proj", "key", "wk"),
    "value": ("v_proj", "value", "wv"),
    "query_key_value": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "att_proj"),
    "output": ("o_proj", "out_proj", "dense", "wo", "c_proj", "attn_out"),
}
#: The same of the feed-forward's.
FEED_FORWARD_ROLES: dict[str, tuple[str, ...]] = {
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out"),
}
#: Whole names of linears that GPT-2 holds with weights as (in, out).
TRANSPOSED = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
#: The roles that a `light` layout adapts: keys, values, and what is multiplied by the gate. A
#: linear that holds one of them among others is adapted as a whole.
LIGHT = frozenset({"key", "value", "query_key_value", "up", "gate_up"})
#: What stands in a module's name if it holds attention, attention over an encoder, or experts.
_ATTENTION, _CROSS, _EXPERTS = re.compile(r"attn|attention", re.I), "cross", "expert"


def part_of(name: str) -> Part:
    """The part of a block that a linear belongs to."""
    module = name.rpartition(".")[0]
    if not _ATTENTION.search(module):
        return "feed_forward"
    return "cross_attention" if _CROSS in module else "attention"


def role_of(name: str) -> str | None:
    """What a linear computes; None if its name does not say."""
    last = name.rpartition(".")[2]
    roles = FEED_FORWARD_ROLES if part_of(name) == "feed_forward" else ATTENTION_ROLES
    return next((role for role, names in roles.items() if last in names), None)


def is_of_experts(name: str) -> bool:
    """Whether a name is that of a mixture of experts, or of something in one."""
    return _EXPERTS in name.lower()


def are_transposed(names: Iterable[str]) -> bool:
    """Whether linears of these whole names are likely to hold weights as (in, out).

    For programs that want to be told and that look for themselves, as PEFT does: GPT-BigCode has
    the same names for usual ones.
    """
    return any(TRANSPOSED.fullmatch(name) for name in names)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of a block's linears in an order that depends on nothing else: by part and role."""
    roles = [*ATTENTION_ROLES, *FEED_FORWARD_ROLES]

    def place(name: str) -> tuple[int, int, str]:
        role = role_of(name)
        return PARTS.index(part_of(name)), roles.index(role) if role else len(roles), name

    return tuple(sorted(set(names), key=place))


def in_layout(layout: str, names: Sequence[str]) -> tuple[str, ...]:
    """The linears of a block that a named layout adapts."""
    if layout == "full":
        return tuple(names)
    if layout == "attention":
        return tuple(name for name in names if part_of(name) != "feed_forward")
    return tuple(name for name in names if role_of(name) in LIGHT)


def is_complete(layout: str, names: Sequence[str]) -> bool:
    """Whether a block may have no other linears of a layout than these, by their roles."""
    roles = {role_of(name) for name in names}
    attention, feed_forward = roles & set(ATTENTION_ROLES), roles & set(FEED_FORWARD_ROLES)
    if layout == "light":
        return attention in ({"key", "value"}, {"query_key_value"}) and len(feed_forward) == 1
    has_attention = attention in (
        {"query", "key", "value", "output"},
        {"query_key_value", "output"},
    )
    wide = {"up", "gate_up"} & feed_forward
    return has_attention and (layout == "attention" or bool(wide and "down" in feed_forward))
