"""Few-shot jobs over a decoder-only backbone: together as alone, and against plain autograd."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from adapters.tiny import randomise
from placed import place_model
from small_causal import small_causal
from small_jobs import (
    CPU,
    MHR,
    Bench,
    assert_same,
    make_config,
    make_few_shot,
    make_task,
    tokenizer,
)
from torch.nn import functional as F

from mhr_scale.adapters import Adapter, find_sites
from mhr_scale.config import VariantConfig
from mhr_scale.engine.gradients import order_gradients
from mhr_scale.families.causal import CAUSAL
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.job_data import open_data
from mhr_scale.jobs.start import start
from mhr_scale.jobs.wave import Member, Wave

KINDS = {
    "full": VariantConfig(adapter="source"),
    "routing": VariantConfig(adapter="source", kind="routing"),
}
LOSSES = {
    "language_model": {"label_smoothing": 0.1},
    "t_few": {"loss": "t_few", "mc_weight": 0.5, "ul_weight": 2.0, "length_norm": 0.7},
}


class CausalBench(Bench):
    """A small Llama that waves are bound to, and adapters to start from."""

    def __init__(self) -> None:
        model = small_causal("llama", vocab_size=384, eos_token_id=1)
        self.sites = find_sites(model, "full")
        self.placed = place_model(model, self.sites)
        order_gradients(model, self.placed.family)
        self.source = randomise(Adapter(MHR, self.sites, task_names=("copy", "sort")))

    def open(self, kind: str, loss: str, numbers: Sequence[int]) -> Wave:
        """Jobs of these numbers, with other lengths of rows and steps."""
        config = make_config(KINDS[kind], **LOSSES[loss])
        members = []
        for number in numbers:
            few_shot = make_few_shot(make_task(f"task{number}", 8 + number))
            data = open_data(few_shot, config, tokenizer(), CAUSAL)
            members.append(Member(Job(task=f"task{number}", seed=0, variant="v"), data, 3 + number))
        adapters = [start(m.job, KINDS[kind], self.source, sites=self.sites) for m in members]
        return Wave.open(config, KINDS[kind], members, adapters, device=CPU)


@pytest.fixture(scope="module")
def bench() -> CausalBench:
    return CausalBench()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_jobs_together_equal_jobs_alone_bit_for_bit(
    bench: CausalBench, kind: str, loss: str
) -> None:
    together = bench.train(bench.open(kind, loss, (0, 1, 2)))
    for number in range(3):
        alone = bench.train(bench.open(kind, loss, (number,)))
        (job,) = alone.tensors
        assert len(alone.values[job]) == 3 + number
        assert together.values[job] == alone.values[job]
        assert_same(together.tensors[job], alone.tensors[job])


def test_the_losses_of_a_step_equal_one_text_at_a_time(bench: CausalBench) -> None:
    wave = bench.open("full", "t_few", (0,))
    rows: Any = wave.members[0].data.batch(0)
    wave.adapter.bind(bench.placed.adapted)
    model = bench.placed.model.eval()
    lm = mc = ul = 0.0
    n_right = n_wrong = 0
    with torch.no_grad(), wave.adapter.slots([0]):
        for row in rows:
            nlls = []
            for answer in row.answers:
                ids = torch.tensor([[*row.input_ids, *answer]])
                logits = model(input_ids=ids).logits[0, len(row.input_ids) - 1 : -1]
                nlls.append(
                    F.cross_entropy(logits, torch.tensor([*map(int, answer)]), reduction="none")
                )
            scores = torch.stack([nll.sum() / len(nll) ** 0.7 for nll in nlls])
            lm += nlls[row.label].sum().item()
            n_right += len(nlls[row.label])
            mc += F.cross_entropy(-scores[None], torch.tensor([row.label])).item()
            for nll in (nll for place, nll in enumerate(nlls) if place != row.label):
                ul += -torch.log(1.01 - torch.exp(-nll)).sum().item()
                n_wrong += len(nll)
    found = bench.step(wave).of(0)
    wanted = {"lm": lm / n_right, "mc": mc / len(rows), "ul": ul / n_wrong}
    wanted["loss"] = wanted["lm"] + 0.5 * wanted["mc"] + 2.0 * wanted["ul"]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
