"""Plans of small mixtures, their epochs, and plans drawn at random."""

from collections import defaultdict
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st

from mhr_scale.config import MixtureConfig
from mhr_scale.tasks.mixture import MixturePlan, Share


def make_plan(*sizes, seed=7, own=None, **settings):
    """A plan over tasks a, b, c, ... of these sizes; `own` has fields of single shares by name."""
    shares = [Share(name="abcdefghijkl"[i], size=size) for i, size in enumerate(sizes)]
    shares = [replace(share, **(own or {}).get(share.name, {})) for share in shares]
    return MixturePlan(shares, config=MixtureConfig(**settings), seed=seed)


def take_epochs(plan, first=0, count=1):
    return plan.samples(first * plan.epoch_size, (first + count) * plan.epoch_size)


def rows_by_task(samples):
    rows = defaultdict(list)
    for sample in samples:
        rows[sample.task].append(sample.row)
    return dict(rows)


@st.composite
def plans(draw, first_rows=None):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    names = "abcdef"[: len(sizes)]
    amounts = st.floats(0.05, 4.0)
    return make_plan(
        *sizes,
        seed=draw(st.integers(0, 2**40)),
        cap=draw(st.none() | st.integers(1, 50)),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0, 10.0])),
        weights=draw(st.dictionaries(st.sampled_from(names), amounts)),
        first_rows=draw(st.booleans()) if first_rows is None else first_rows,
        group=draw(st.integers(1, 6)),
        own=draw(
            st.dictionaries(
                st.sampled_from(names),
                st.fixed_dictionaries({"cap": st.integers(1, 50), "weight": amounts}),
            )
        ),
    )


properties = settings(max_examples=60, deadline=None)
