"""Jobs of kind backbone: full fine-tuning beside an adapter, one job at a time."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.optimization import Adafactor

from mhr_scale import backbone, scoring
from mhr_scale.adapters import AdapterConfig, state
from mhr_scale.adapters.methods import wrap
from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    BackboneConfig,
    JsonlTasks,
    OptimConfig,
    ProtocolConfig,
    ScoringConfig,
    SelectionConfig,
    ShotsConfig,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.engine import Engine
from mhr_scale.errors import ConfigError, DivergenceError
from mhr_scale.jobs.full import WEIGHTS, FullWave, named_weights
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.opening import Opening, all_sites, open_jobs
from mhr_scale.jobs.plan import Planned
from mhr_scale.jobs.wave import StepValues, Wave
from mhr_scale.verbs.adapt import adapt, look_out, open_wave

TOY = BackboneConfig(name="builtin:toy", dtype="float32")
TIED = BackboneConfig(
    config={
        "vocab_size": 384,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    },
    dtype="float32",
)
LORA = AdapterConfig(n_skills=1, rank=2)
FULL = VariantConfig(fresh=LORA, kind="backbone", backbone_lr=1e-3)
PLAIN = VariantConfig(fresh=LORA)
ADAMW = OptimConfig(name="adamw", lr=5e-3, weight_decay=0.1, clip_norm=1.0, eps=1e-6)
ADAFACTOR = OptimConfig(lr=3e-3, scale_parameter=True)
RANKED = ProtocolConfig(steps=12, batch_size=4, loss="t_few", warmup_fraction=0.25)
TOLD = replace(RANKED, loss="language_model")


# --- the bench


def write_task(folder: Path, name: str) -> None:
    """Letters and, among three choices, their reverse."""
    draw = random.Random(name)
    (folder / name).mkdir(parents=True)
    for fold, count in (("train", 12), ("test", 6)):
        lines = []
        for _ in range(count):
            letters = draw.sample("abcdefghijkl", 5)
            choices = [" ".join(found) for found in (letters[::-1], letters, sorted(letters))]
            row = {"input": " ".join(letters), "target": choices[0], "choices": choices}
            lines.append(json.dumps(row) + "\n")
        (folder / name / f"{fold}.jsonl").write_text("".join(lines))


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., AdaptConfig]:
    """Makes a recipe: the tasks and the name of the run folder, and what is not as usual."""

    def recipe(tasks: tuple[str, ...] = ("one",), run: str = "run", **changes: Any) -> AdaptConfig:
        folder = tmp_path / "-".join(tasks)
        for task in tasks:
            if not (folder / task).exists():
                write_task(folder, task)
        config = AdaptConfig(
            variants={"f": FULL},
            tasks=JsonlTasks(suite="jsonl", folder=str(folder), validation_examples=0),
            shots=ShotsConfig(seeds=(0,)),
            backbone=TOY,
            protocol=RANKED,
            optim=ADAMW,
            selection=SelectionConfig(on="last"),
            scoring=ScoringConfig(metric="accuracy"),
            run=AdaptRunConfig(folder=str(tmp_path / run), log_every=1),
        )
        return replace(config, **changes)

    return recipe


class Bench:
    """What the verb opens, for one job after the other by hand."""

    def __init__(self, config: AdaptConfig) -> None:
        self.opening: Opening = open_jobs(config)
        self.engine = Engine({}, timeout_seconds=60.0)
        self.model: Any = self.engine.build(self.opening.backbone, self.opening.blueprint)
        self.linears = wrap(self.model, all_sites(self.opening, self.model))
        self.engine.prepare(self.model, self.opening.backbone)

    def open(self, number: int = 0) -> Wave:
        planned = Planned((look_out(self.opening, self.opening.jobs[number], 0),))
        return open_wave(self.opening, planned, {}, device=self.engine.device)

    def step(self, wave: Wave, after_backward: Callable[[], None] = lambda: None) -> StepValues:
        wave.adapter.bind(self.linears)
        self.model.train()
        device = self.engine.device
        return wave.train_step(self.model, device=device, after_backward=after_backward)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: w.detach().cpu().clone() for name, w in named_weights(self.model).items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The tensors that are not equal bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def fresh_model(config: BackboneConfig) -> Any:
    """The backbone as it was before the job, without adapters."""
    return Engine({}, timeout_seconds=60.0).build(config, backbone.read_blueprint(config))


def result_of(config: AdaptConfig, task: str = "one", variant: str = "f") -> dict[str, Any]:
    return json.loads((folder_of(config, task, variant) / "result.json").read_text())


def folder_of(config: AdaptConfig, task: str = "one", variant: str = "f") -> Path:
    return Job(task=task, seed=0, variant=variant).folder(Path(config.run.folder))


def left_by(config: AdaptConfig, task: str = "one", variant: str = "f") -> dict[str, torch.Tensor]:
    """All tensors that a finished job left."""
    folder = folder_of(config, task, variant)
    tensors = dict(load_file(folder / "adapter" / state.TENSORS))
    if (folder / WEIGHTS).exists():
        tensors |= load_file(folder / WEIGHTS)
    return tensors


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
    tensors = {k: v.clone() for k, v in state.named_tensors(wave.take(0)).items()}
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
            [torch.tensor(r.choices[0]).long() for r in rows], True, padding_value=-100
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
        found = {**state.named_tensors(wave.take(0)), **bench.weights()}
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


def test_they_are_put_back_when_the_job_raises(recipe: Callable[..., AdaptConfig]) -> None:
    bench = Bench(recipe())
    wave, before = bench.open(), bench.weights()

    def run_out() -> None:
        raise RuntimeError("out of memory")

    def train() -> None:
        with wave.thawed(bench.model):
            bench.step(wave)
            bench.step(wave)
            bench.step(wave, after_backward=run_out)

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
            trained.append({**bench.weights(), **state.named_tensors(wave.take(0))})
    assert not differing(*trained)


# --- through the verb


def test_two_jobs_one_after_the_other_equal_each_alone(
    recipe: Callable[..., AdaptConfig],
) -> None:
    together = recipe(("one", "two"), "together")
    adapt(together)
    for task in ("one", "two"):
        alone = recipe((task,), f"alone-{task}")
        adapt(alone)
        assert not differing(left_by(together, task), left_by(alone, task))
        assert result_of(together, task) == result_of(alone, task)


@pytest.mark.parametrize("rate", [1e-3, 1e30], ids=["fine", "diverging"])
def test_ordinary_variants_do_not_notice_it(
    recipe: Callable[..., AdaptConfig], rate: float
) -> None:
    tasks, waves = ("one", "two"), WavesConfig(size=1)
    beside = recipe(
        tasks, "beside", waves=waves, variants={"a": replace(FULL, backbone_lr=rate), "b": PLAIN}
    )
    if rate == 1e30:
        with pytest.raises(DivergenceError, match="2 job"):
            adapt(beside)
    else:
        adapt(beside)
    alone = recipe(tasks, "alone", waves=waves, variants={"b": PLAIN})
    adapt(alone)
    for task in tasks:
        assert not differing(left_by(beside, task, "b"), left_by(alone, task, "b"))
        assert result_of(beside, task, "b") == result_of(alone, task, "b")


def test_ordinary_variants_share_waves_beside_it(recipe: Callable[..., AdaptConfig]) -> None:
    config = recipe(("one", "two"), variants={"a": FULL, "b": PLAIN})
    adapt(config)
    results = [result_of(config, task, name) for task in ("one", "two") for name in "ab"]
    assert [result["kind"] for result in results] == ["backbone", "full"] * 2


def test_the_result_counts_adapter_and_backbone(recipe: Callable[..., AdaptConfig]) -> None:
    config = recipe(variants={"f": FULL, "lora": PLAIN})
    adapt(config)
    adapter = result_of(config, variant="lora")["trained_numbers"]
    own = sum(parameter.numel() for parameter in fresh_model(TOY).parameters())
    assert result_of(config)["trained_numbers"] == adapter + own


def test_nothing_but_the_best_weights_and_their_adapter_stays(
    recipe: Callable[..., AdaptConfig],
) -> None:
    selection = SelectionConfig(on="test", every_epochs=1)
    config = recipe(selection=selection, waves=WavesConfig(save_every=2))
    adapt(config)
    folder = folder_of(config)
    expected = {"adapter", WEIGHTS, "metrics.jsonl", "scores.jsonl", "result.json"}
    assert {path.name for path in folder.iterdir()} == expected
    assert state.read_card(folder).origin["backbone"] == WEIGHTS


def test_better_weights_take_the_place_of_those_before(
    recipe: Callable[..., AdaptConfig], tmp_path: Path
) -> None:
    bench = Bench(recipe())
    wave = bench.open()
    with wave.thawed(bench.model):
        for name in ("000000", "000003"):
            wave.keep(0, tmp_path / "best" / name, backbone={})
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["000003"]


def selections() -> list[Any]:
    return [
        pytest.param(SelectionConfig(on=on, every_epochs=1), id=on)
        for on in ("test", "shots", "last")
    ]


@pytest.mark.parametrize("selection", selections())
@pytest.mark.parametrize("own", [TOY, TIED], ids=["untied", "tied"])
def test_a_fresh_model_with_the_weights_and_the_adapter_gives_the_scores(
    recipe: Callable[..., AdaptConfig], own: BackboneConfig, selection: SelectionConfig
) -> None:
    shots = ShotsConfig(seeds=(0,), set_aside=4)
    config = recipe(backbone=own, selection=selection, shots=shots)
    adapt(config)
    folder, model = folder_of(config), fresh_model(own)
    parameters, tensors = dict(model.named_parameters()), load_file(folder / WEIGHTS)
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    adapter = state.load(folder, model=model)
    (data,) = open_jobs(config).data.values()
    batch = [replace(row, task=0) for row in data.test.rows]
    scores = scoring.rank_choices(
        model, adapter, batch, length_norm=1.0, device=next(model.parameters()).device
    )
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, scores, strict=True):
        assert line["choice_scores"] == pytest.approx(expected, abs=1e-5)
    right = sum(
        values.index(min(values)) == question.example.label
        for values, question in zip(scores, data.test.questions, strict=True)
    )
    assert result_of(config)["score"] == pytest.approx(100.0 * right / len(batch))


def test_the_scores_are_those_of_the_best_step(recipe: Callable[..., AdaptConfig]) -> None:
    """A job that stops where another one was best leaves what the other one kept."""
    constant = replace(RANKED, decay="constant", warmup_fraction=0.0, steps=9)
    selection = SelectionConfig(on="shots", every_epochs=1)
    shots = ShotsConfig(seeds=(0,), set_aside=4)
    changes = {"selection": selection, "shots": shots, "protocol": constant}
    wild = {"f": replace(FULL, backbone_lr=2e-2)}
    config = recipe(run="long", variants=wild, **changes)
    adapt(config)
    best = result_of(config)["best_step"]
    assert 0 < best < 9
    changes["selection"] = SelectionConfig(on="last")
    changes["protocol"] = replace(constant, steps=best)
    short = recipe(run="short", variants=wild, **changes)
    adapt(short)
    assert not differing(left_by(config), left_by(short))
    assert result_of(config)["score"] == result_of(short)["score"]


def test_an_interrupted_job_starts_again(
    recipe: Callable[..., AdaptConfig], caplog: pytest.LogCaptureFixture
) -> None:
    selection = SelectionConfig(on="test", every_epochs=1)
    config = recipe(selection=selection)
    adapt(config)
    folder, before, expected = folder_of(config), left_by(config), result_of(config)
    (folder / "result.json").unlink()
    (folder / "best").mkdir()
    (folder / "adapter").rename(folder / "best" / "000003")
    with caplog.at_level("INFO", logger="mhr_scale"):
        adapt(config)
    assert "starts again" in caplog.text
    assert not differing(left_by(config), before)
    assert result_of(config) == expected
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert sorted(map(json.loads, lines), key=str) == sorted(map(json.loads, set(lines)), key=str)


def test_a_finished_job_is_left_alone(recipe: Callable[..., AdaptConfig]) -> None:
    config = recipe()
    adapt(config)
    written = (folder_of(config) / WEIGHTS).stat().st_mtime_ns
    adapt(config)
    assert (folder_of(config) / WEIGHTS).stat().st_mtime_ns == written


def test_it_starts_from_a_trained_inventory(recipe: Callable[..., AdaptConfig]) -> None:
    first = recipe(run="first", variants={"lora": replace(PLAIN, fresh=AdapterConfig(rank=1))})
    adapt(first)
    source = str(folder_of(first, variant="lora") / "adapter")
    config = recipe(backbone=None, variants={"f": replace(FULL, fresh=None, adapter=source)})
    bench = Bench(config)
    wave = bench.open()
    assert isinstance(wave, FullWave)
    stored = load_file(Path(source) / state.TENSORS)
    tensors = state.named_tensors(wave.take(0))
    different = differing(tensors, stored)
    assert different
    assert all(name.endswith("routing_logits") for name in different)


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
    assert state.read_card(folder_of(config)).backbone["dtype"] == "float32"
