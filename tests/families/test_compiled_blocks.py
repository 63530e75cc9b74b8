"""Blocks as compiled graphs: no break, the numbers of blocks that run as they are, few graphs.

torch's backend "eager" runs a graph operation by operation, "aot_eager" its backward graph too.
A break of a graph is an error (`fullgraph`), wherever blocks are compiled.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from laid_rows import SIZES, T5S, make_rows, pack
from small_causal import enlarge, small_causal
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForSeq2SeqLM

from mhr_scale.adapters import Adapter, AdapterConfig, attach
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import AdapterError
from mhr_scale.families import compiled
from mhr_scale.families.modes import set_dropout, set_recompute
from mhr_scale.families.packed import Packed
from mhr_scale.families.sequences import SpreadStream
from mhr_scale.families.table import find_family
from mhr_scale.passes.filled import filled
from mhr_scale.passes.losses import token_losses

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

TASKS = ("a", "b", "c")
MHR = AdapterConfig(layout="full", rank=2, n_skills=3, n_splits=2)
POLY = AdapterConfig(layout="light", rank=1, n_skills=3)
LORA = AdapterConfig(layout="full", rank=2, n_skills=1)
IA3 = AdapterConfig(kind="ia3", layout="full", n_skills=3, n_splits=2)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """Graphs of other tests would count."""
    yield
    forget()


def forget() -> None:
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    counters.clear()


def make(name: str, *, depth: int = 1) -> Any:
    """A frozen model with the faster parts, which trains without dropout."""
    if name in T5S:
        kind, fields = T5S[name]
        sizes = {**SIZES, **fields, "num_layers": depth}
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = enlarge(AutoModelForSeq2SeqLM.from_config(kind(**sizes)))
    else:
        depth_name = "n_layer" if name == "gpt2" else "num_hidden_layers"
        model = small_causal(name, **{depth_name: depth})
    find_family(model.config).fuse(model, BackboneConfig(name="x"))
    set_dropout(model, 0.0)
    return model.train().requires_grad_(False)


def adapted(model: Any, config: AdapterConfig) -> Adapter:
    adapter = attach(model, config, tasks=TASKS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def compile_it(model: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    stacks = find_family(model.config).blocks(model.config).values()
    names = [name for stack in stacks for name in stack.list_modules()]
    compiled.compile_blocks(model.get_submodule(name) for name in names)


def step(model: Any, adapter: Adapter, packed: Packed) -> dict[str, Tensor]:
    """Losses of all target positions, and gradients of their sum."""
    adapter.zero_grad(set_to_none=True)
    with filled(adapter, packed) as slots:
        predicted = find_family(model.config).predictions(model, packed)
        losses = token_losses(predicted, packed.labels_BD, packed.sources)
        slots.backward(losses.sum())
    gradients = {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), **gradients}


def n_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("name", "config", "is_flat", "backend"),
    [
        ("llama", MHR, False, "aot_eager"),
        ("llama", LORA, True, "eager"),
        ("gemma2", IA3, False, "eager"),
        ("gpt2", MHR, False, "eager"),
        ("t5 v1.1", POLY, False, "eager"),
    ],
)
def test_a_graph_computes_what_its_block_does(
    name: str, config: AdapterConfig, is_flat: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    adapter, packed = adapted(model, config), pack(model, make_rows()[:3], is_flat=is_flat)
    expected = step(model, adapter, packed)
    assert all(bool(tensor.any()) for tensor in expected.values())
    names = list(model.state_dict())
    compile_it(model, backend, monkeypatch)
    found = step(model, adapter, packed)
    assert n_graphs() == len(find_family(model.config).blocks(model.config))
    assert list(model.state_dict()) == names
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_flat", [False, True])
def test_a_step_of_other_rows_slots_and_sizes_needs_no_new_graph(
    is_flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    adapter, rows = adapted(model, MHR), make_rows()[:3]
    others = [replace(row, input_ids=row.input_ids[1:], task=row.number % 2) for row in rows]
    both = [pack(model, some, is_flat=is_flat) for some in (rows, [*others, others[2]])]
    streams = [stream for packed in both for stream in packed.streams]
    numbers = {len(stream.parts) for stream in streams if isinstance(stream, SpreadStream)}
    assert len(numbers) == is_flat
    expected = [step(model, adapter, packed) for packed in both]
    compile_it(model, "eager", monkeypatch)
    for packed, wanted in zip(both, expected, strict=True):
        torch.testing.assert_close(step(model, adapter, packed), wanted, rtol=0, atol=0)
        assert n_graphs() == 1


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_blocks_are_computed_anew_around_their_graphs(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    adapter, packed = adapted(model, LORA), pack(model)
    expected = step(model, adapter, packed)
    set_recompute(model, mode)
    compile_it(model, "eager", monkeypatch)
    torch.testing.assert_close(step(model, adapter, packed), expected, rtol=0, atol=0)
    assert n_graphs() == {"reentrant": 2, "non_reentrant": 1}[mode]


def test_evaluation_has_graphs_and_generation_over_a_cache_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("llama").eval()
    family, adapter, packed = find_family(model.config), adapted(model, MHR), pack(model)
    prompts, device = make_rows()[:1], torch.device("cpu")

    def evaluate() -> tuple[Tensor, list[list[int]]]:
        with torch.inference_mode(), filled(adapter, packed):
            logits = family.logits(model, packed)
        with torch.inference_mode(), adapter.off():
            bare = family.logits(model, packed)
        assert not torch.equal(bare, logits)
        with torch.inference_mode(), adapter.slots(["a"]):
            options = {"max_new_tokens": 4, "do_sample": False}
            return logits, family.generate(model, prompts, device=device, **options)

    logits, texts = evaluate()
    compile_it(model, "eager", monkeypatch)
    found, again = evaluate()
    assert torch.equal(found, logits)
    assert again == texts
    assert n_graphs() == 2  # with the adapter and without


def test_what_is_refused_without_a_graph_is_refused_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    adapter, packed = adapted(model, MHR), pack(model)
    compile_it(model, "eager", monkeypatch)
    family = find_family(model.config)
    message = "an adapted linear got 5 rows under slots made for 3"
    with pytest.raises(AdapterError, match=message), adapter.slots([0, 1, 2]):
        family.logits(model, packed)
    with filled(adapter, packed):
        loss = family.logits(model, packed).sum()
        with pytest.raises(AdapterError, match=r"call slots.backward\(loss\) inside"):
            loss.backward()
