"""Jobs of kind backbone, by hand: how they train, and the backbone afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from full_jobs import (
    ADAFACTOR,
    ADAMW,
    FULL,
    LORA,
    PLAIN,
    RANKED,
    TIED,
    TOLD,
    TOY,
    Bench,
    differing,
    folder_of,
    fresh_model,
)
from torch import nn
from torch.nn import functional as F
from transformers.optimization import Adafactor

from mhr_scale.adapters import artefact
from mhr_scale.config import AdaptConfig, AdaptRunConfig, BackboneConfig, OptimConfig
from mhr_scale.errors import ConfigError
from mhr_scale.jobs.wave import Wave
from mhr_scale.verbs.adapt import adapt

# --- training


@pytest.mark.parametrize("optim", [ADAMW, ADAFACTOR], ids=["adamw", "adafactor"])
@pytest.mark.parametrize("loss", ["t_few", "language_model"])
def test_the_loss_falls(recipe: Callable[..., AdaptConfig], optim: OptimConfig, loss: str) -> None:
    full = replace(FULL, backbone_lr=1e-3 if optim is ADAMW else 3e-2)
    protocol = replace(RANKED, loss=loss, steps=40)
    bench = Bench(recipe(optim=optim, protocol=protocol, variants={"f": full}))
    wave = bench.open()
    with wave.thawed(bench.model):
        losses = [bench.step(wave).values["loss"][0] for _ in range(40)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def plain_loop(
    wave: Wave, model: Any, optim: OptimConfig, *, steps: int
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Full fine-tuning and LoRA as one would write it down; losses, norms, trained tensors."""
    tensors = {k: v.clone() for k, v in artefact.named_tensors(wave.take(0)).items()}
    device = next(model.parameters()).device
    sides = {name: nn.Parameter(tensors[name].to(device)) for name in tensors}
    for site in wave.adapter.sites:
        width_a, width_b = sides[f"{site.name}.A"], sides[f"{site.name}.B"]

        def add(module: Any, inputs: Any, y: Any, a: Any = width_a, b: Any = width_b) -> Any:
            return y + inputs[0] @ a[0, 0] @ b[0, 0] / LORA.rank

        model.get_submodule(site.name).register_forward_hook(add)
    model.requires_grad_(True).train()
    groups = [
        {"params": list(sides.values()), "peak": optim.lr},
        {"params": list(model.parameters()), "peak": wave.variant.backbone_lr},
    ]
    kind: Any = torch.optim.AdamW
    options: dict[str, Any] = {"weight_decay": optim.weight_decay, "lr": 1.0, "eps": optim.eps}
    if optim.name == "adafactor":
        kind = Adafactor
        options = {"lr": 1.0, "relative_step": False, "scale_parameter": True}
    optimizer = kind(groups, **options)
    parameters = [*sides.values(), *model.parameters()]
    losses, norms = [], []
    warmup = int(wave.config.protocol.warmup_fraction * steps)
    for step in range(steps):
        rows = wave.members[0].data.batch(step)
        inputs = nn.utils.rnn.pad_sequence([torch.tensor(r.input_ids).long() for r in rows], True)
        labels = nn.utils.rnn.pad_sequence(
            [torch.tensor(r.answers[0]).long() for r in rows], True, padding_value=-100
        )
        starts = torch.zeros_like(labels[:, :1])
        logits = model(
            input_ids=inputs.to(device),
            attention_mask=(inputs != 0).to(device),
            decoder_input_ids=torch.cat([starts, labels[:, :-1].clamp(min=0)], 1).to(device),
            use_cache=False,
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten().to(device))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, 1.0).item())
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {**sides, **dict(model.named_parameters())}


@pytest.mark.parametrize("optim", [ADAMW, ADAFACTOR], ids=["adamw", "adafactor"])
@pytest.mark.parametrize("own", [TOY, TIED], ids=["untied", "tied"])
def test_a_job_equals_a_plain_loop_over_all_parameters(
    recipe: Callable[..., AdaptConfig], own: BackboneConfig, optim: OptimConfig
) -> None:
    bench = Bench(recipe(backbone=own, optim=optim, protocol=TOLD))
    wave = bench.open()
    losses, norms, expected = plain_loop(wave, fresh_model(own), optim, steps=TOLD.steps)
    with wave.thawed(bench.model):
        values = [bench.step(wave).values for _ in range(TOLD.steps)]
        found = {**artefact.named_tensors(wave.take(0)), **bench.weights()}
    assert [v["loss"][0] for v in values] == pytest.approx(losses, abs=1e-5)
    assert [v["grad_norm"][0] for v in values] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 1.0
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach().cpu(), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("own", [TOY, TIED], ids=["untied", "tied"])
def test_every_weight_of_the_bare_model_trains(
    recipe: Callable[..., AdaptConfig], own: BackboneConfig
) -> None:
    bench = Bench(recipe(backbone=own))
    wave, before = bench.open(), bench.weights()
    with wave.thawed(bench.model):
        for _ in range(RANKED.steps):
            bench.step(wave)
        moved = differing(bench.weights(), before)
    assert moved == [name for name, _ in fresh_model(own).named_parameters()]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_recomputation_changes_no_more_than_rounding(
    recipe: Callable[..., AdaptConfig], mode: str
) -> None:
    """Attention takes another kernel where its bias trains, and gradients meet in another order."""
    found = []
    for own in (TOY, replace(TOY, recompute=mode)):
        bench = Bench(recipe(backbone=own))
        wave = bench.open()
        with wave.thawed(bench.model):
            for _ in range(RANKED.steps):
                bench.step(wave)
            found.append(bench.weights())
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-5)


# --- the backbone afterwards


def test_the_weights_are_put_back_bit_for_bit(recipe: Callable[..., AdaptConfig]) -> None:
    bench = Bench(recipe())
    wave, before = bench.open(), bench.weights()
    with wave.thawed(bench.model):
        bench.step(wave)
        bench.step(wave)
        assert differing(bench.weights(), before)
    assert not differing(bench.weights(), before)
    assert all(w.grad is None and not w.requires_grad for w in bench.model.parameters())


def test_they_are_put_back_when_the_job_diverges(recipe: Callable[..., AdaptConfig]) -> None:
    bench = Bench(recipe(variants={"f": replace(FULL, backbone_lr=1e30)}))
    wave, before = bench.open(), bench.weights()
    with wave.thawed(bench.model):
        finite = [bench.step(wave).is_finite(0) for _ in range(4)]
    assert not finite[-1]
    assert not differing(bench.weights(), before)


def test_they_are_put_back_when_the_job_raises(
    recipe: Callable[..., AdaptConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(recipe())
    wave, before = bench.open(), bench.weights()

    def run_out() -> None:
        raise RuntimeError("out of memory")

    def train() -> None:
        with wave.thawed(bench.model):
            bench.step(wave)
            bench.step(wave)
            monkeypatch.setattr(bench.placed.engine, "after_backward", run_out)
            bench.step(wave)

    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    assert not differing(bench.weights(), before)
    assert all(w.grad is None and not w.requires_grad for w in bench.model.parameters())


def test_a_job_leaves_no_trace_in_the_next_one(recipe: Callable[..., AdaptConfig]) -> None:
    bench = Bench(recipe())
    trained = []
    for _ in range(2):
        wave = bench.open()
        with wave.thawed(bench.model):
            for _ in range(4):
                bench.step(wave)
            trained.append({**bench.weights(), **artefact.named_tensors(wave.take(0))})
    assert not differing(*trained)


# --- what is refused


def test_a_sharded_backbone_is_refused(recipe: Callable[..., AdaptConfig]) -> None:
    run = AdaptRunConfig(folder="unused", ds_config="ds_configs/zero3.json")
    with pytest.raises(ConfigError, match=r"variants\.f\.kind: .*leave run\.ds_config out"):
        adapt(replace(recipe(), run=run))


def test_half_precision_is_refused(recipe: Callable[..., AdaptConfig]) -> None:
    with pytest.raises(ConfigError, match=r"not bfloat16; set backbone\.dtype: float32"):
        adapt(recipe(backbone=replace(TOY, dtype="bfloat16")))


def test_half_precision_that_comes_with_an_adapter_can_be_overruled(
    recipe: Callable[..., AdaptConfig],
) -> None:
    first = recipe(run="first", backbone=replace(TOY, dtype="bfloat16"), variants={"lora": PLAIN})
    adapt(first)
    source = str(folder_of(first, variant="lora") / "adapter")
    config = recipe(backbone=None, variants={"f": replace(FULL, fresh=None, adapter=source)})
    with pytest.raises(ConfigError, match="set backbone_dtype: float32"):
        adapt(config)
    adapt(replace(config, backbone_dtype="float32"))
    assert artefact.read_card(folder_of(config)).backbone["dtype"] == "float32"
