"""Arrow: tokens that choose among LoRAs, beside a plain restatement and stock PEFT."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from peft_folders import IA3, LORA, MHR, OTHERS, WITHOUT_OTHERS
from small_causal import make_rows, small_causal
from stock_peft import assert_close
from tiny import TASKS, logits, make_adapted, make_batch, make_t5, randomise
from torch import nn

from mhr_scale import attach, detach
from mhr_scale.adapters import peft_folders
from mhr_scale.adapters.collapse import average, collapse, soup
from mhr_scale.adapters.library import join, route_by_token
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import AdapterError
from mhr_scale.families.fused import as_on_gpu
from mhr_scale.families.table import find_family
from mhr_scale.passes.filled import filled

pytestmark = WITHOUT_OTHERS

PRIVATE = replace(LORA, private=True)
IDS = [0] * 4


class Plain(nn.Module):
    """One linear under Arrow, as the paper has it: whole updates, their SVD, token by token."""

    def __init__(self, base, pairs, *, scale, top_k, temperature):
        super().__init__()
        self.base, self.top_k, self.temperature = base, top_k, temperature
        self.updates_EOI = scale * torch.stack([(a @ b).T for a, b in pairs])
        rows_EI = torch.linalg.svd(self.updates_EOI)[2][:, 0]
        is_zero = (self.updates_EOI == 0).flatten(1).all(1)
        self.directions_EI = torch.where(is_zero[:, None], 0.0, rows_EI)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        y = self.base(x)
        tokens, into = x.flatten(0, -2), y.view(-1, y.shape[-1])
        for number, token in enumerate(tokens):
            scores_E = (self.directions_EI @ token).abs()
            chosen = scores_E.argsort(descending=True)[: self.top_k]
            weights = (scores_E[chosen] / self.temperature).softmax(0)
            for weight, expert in zip(weights, chosen, strict=True):
                into[number] += weight * (self.updates_EOI[expert] @ token)
        return y


def tamed(adapter):
    """Smaller LoRAs: what a token chooses hangs less on the last digits of the layers below."""
    for parameter in adapter.inventory.parameters():
        parameter.data *= 0.3
    return adapter


def restate(model, adapter, *, top_k, temperature):
    """The model, bare, with a plain module in place of every adapted linear."""
    stored = dict(adapter.inventory.named_tensors())
    for site in adapter.sites:
        parent, _, child = site.name.rpartition(".")
        a, b = (stored[f"{site.name}.{side}"][:, 0, 0] for side in "AB")
        plain = Plain(
            model.get_submodule(site.name),
            list(zip(a, b, strict=True)),
            scale=adapter.config.scale,
            top_k=top_k,
            temperature=temperature,
        )
        setattr(model.get_submodule(parent), child, plain)
    return model


@pytest.mark.parametrize("settings", [(1, 1.0), (2, 0.5), (4, 3.0)])
def test_t5_computes_what_the_paper_says(settings) -> None:
    options = dict(zip(("top_k", "temperature"), settings, strict=True))
    model, adapter = make_adapted(PRIVATE, dtype=torch.float32)
    next(iter(tamed(adapter).inventory.parameters())).data[:, 1] = (
        0.0  # has no update, nor a direction
    )
    expected = restate(make_t5().eval(), adapter, **options)(**make_batch(4)).logits
    found = logits(model.eval(), route_by_token(adapter, **options), IDS)
    assert_close(found, expected.detach(), 1e-5)
    with as_on_gpu():
        assert_close(logits(model, adapter, IDS), expected.detach(), 1e-5)


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(
    ("dtype", "top_k", "relative"), [(torch.float32, 2, 1e-5), (torch.bfloat16, 4, 0.03)]
)
def test_rows_of_a_causal_model_may_be_padded_or_flat(is_flat, dtype, top_k, relative) -> None:
    model = small_causal("llama").eval().to(dtype)
    family = find_family(model.config)
    family.fuse(model, BackboneConfig(name="x"))
    adapter = tamed(randomise(attach(model, PRIVATE, tasks=TASKS)))
    plain = restate(small_causal("llama").eval(), adapter, top_k=top_k, temperature=1.0)
    rows = make_rows()
    packed = family.pack(rows, model.config, is_flat=is_flat)
    with torch.no_grad(), filled(route_by_token(adapter, top_k=top_k), packed):
        found = family.logits(model, packed)[packed.labels_BD >= 0]
    padded = family.pack(rows, model.config)
    with torch.no_grad():
        expected = family.logits(plain, padded)[padded.labels_BD >= 0]
    assert_close(found.float(), expected, relative)


def test_stock_peft_computes_the_same(tmp_path) -> None:
    model, adapter = make_adapted(replace(PRIVATE, alpha=1.0), dtype=torch.float32)
    for name, parameter in adapter.inventory.named_parameters():
        if name.startswith("A_"):  # far apart: PEFT's power iteration has 15 steps
            parameter.data[..., 1] *= 0.05
    folders = [
        str(
            peft_folders.write_peft_lora(
                collapse(adapter, task), tmp_path / task, base_model="builtin:toy"
            )
        )
        for task in TASKS
    ]
    config = ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=1)
    with warnings.catch_warnings():
        for message in OTHERS:
            warnings.filterwarnings("ignore", message=message)
        stock = create_arrow_model(make_t5(), folders, config).eval()
    with torch.no_grad():
        expected = stock(**make_batch(4)).logits
    found = logits(model.eval(), route_by_token(adapter, top_k=2, temperature=0.7), IDS)
    assert_close(found, expected, 1e-4)


def test_one_of_one_is_that_lora_and_equal_ones_are_one() -> None:
    model, adapter = make_adapted(PRIVATE, dtype=torch.float32)
    for parameter in adapter.inventory.parameters():
        parameter.data.copy_(parameter.data[:, :1].expand_as(parameter))
    expected = logits(model.eval(), adapter, IDS)
    found = logits(model, route_by_token(adapter, top_k=3, temperature=0.1), IDS)
    assert_close(found, expected, 1e-5)


def test_what_was_made_of_the_experts_is_kept_until_they_move() -> None:
    model, adapter = make_adapted(PRIVATE, dtype=torch.float32)
    route_by_token(adapter, top_k=2)
    first = logits(model.eval(), adapter, IDS)
    made = adapter.by_token._made
    logits(model, adapter, IDS)
    assert adapter.by_token._made is made
    detach(model)
    adapter.bind(wrap(model, adapter.sites))
    assert torch.equal(logits(model, adapter, IDS), first)
    assert adapter.by_token._made is not made


def test_loras_of_other_ranks_and_scales_compute_the_same_in_a_library() -> None:
    configs = {"a": LORA, "b": replace(LORA, rank=1), "c": replace(LORA, rank=3, alpha=0.7)}
    made = {name: make_adapted(config, dtype=torch.float32) for name, config in configs.items()}
    model, _ = make_adapted(LORA, dtype=torch.float32)
    detach(model)
    library = join({name: adapter for name, (_, adapter) in made.items()}, place="here")
    library.bind(wrap(model.eval(), library.sites))
    for name, (alone, adapter) in made.items():
        expected = logits(alone.eval(), adapter, IDS)
        assert_close(logits(model, library, [name] * 4), expected, 1e-5)


def test_generation_reads_the_same_slots() -> None:
    model = small_causal("llama").eval()
    adapter = route_by_token(randomise(attach(model, PRIVATE, tasks=TASKS)), top_k=2)
    plain = restate(small_causal("llama").eval(), adapter, top_k=2, temperature=1.0)
    ids = torch.tensor([[1, 5, 9, 4], [1, 7, 3, 8]])
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad(), adapter.slots([0, 0], rows_per_example=2):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, expected)


def test_training_collapsing_and_writing_are_refused(tmp_path) -> None:
    model, adapter = make_adapted(PRIVATE, dtype=torch.float32)
    route_by_token(adapter, top_k=2)
    with pytest.raises(AdapterError, match="not trained"), adapter.slots([0] * 4) as slots:
        slots.backward(model(**make_batch(4)).loss)
    refused = [
        lambda: average(adapter),
        lambda: collapse(adapter, "sort"),
        lambda: soup(adapter, TASKS),
        lambda: peft_folders.write_peft_lora(adapter, tmp_path, base_model=None),
    ]
    for call in refused:
        with pytest.raises(AdapterError, match="every token has weights of its own"):
            call()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (MHR, {}, "Arrow routes between LoRAs.*this is MHR of kind lora with 3 skill"),
        (LORA, {}, "Arrow routes between LoRAs.*this is LoRA"),
        (replace(IA3, private=True), {}, "this is private of kind ia3"),
        (PRIVATE, {"top_k": 5}, "top_k: 5, of 4 LoRA"),
        (PRIVATE, {"top_k": 0}, "top_k: 0"),
        (PRIVATE, {"temperature": 0.0}, "temperature: 0.0 is not above 0"),
    ],
)
def test_what_is_no_library_is_refused(config, options, message) -> None:
    _, adapter = make_adapted(config, dtype=torch.float32)
    with pytest.raises(AdapterError, match=message):
        route_by_token(adapter, **options)
