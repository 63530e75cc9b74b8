"""PEFT's LoRAs as an inventory: the same outputs before training, and MHR trained on from there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_causal import small_causal
from small_t5 import small_t5

from mhr_scale import AdapterConfig, attach, from_peft
from mhr_scale.adapters import peft_folders
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.errors import AdapterError, ConfigError, LayoutError

MODELS = {"causal": lambda: small_causal("llama"), "encoder-decoder": small_t5}
IDS = torch.arange(3, 27).reshape(2, 12)
WITHOUT_OTHERS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).logits


def make_peft(form: str, sizes: dict[str, tuple[int, int]], targets: Any = "all-linear") -> Any:
    """A live PeftModel with LoRAs of these ranks and alphas, none of them zero."""
    torch.manual_seed(7)
    model = None
    for name, (rank, alpha) in sizes.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        if model is None:
            model = get_peft_model(MODELS[form](), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.eval()


def train(adapter: Any, model: Any, tasks: list[str]) -> list[float]:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        with adapter.slots(tasks) as slots:
            loss = model(input_ids=IDS, labels=IDS).loss
            slots.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@WITHOUT_OTHERS
@pytest.mark.parametrize("form", MODELS)
def test_one_lora_is_the_same_for_every_task_and_trains_on(form: str, tmp_path: Path) -> None:
    source = make_peft(form, {"default": (3, 5)})
    wanted = logits(source)
    source.save_pretrained(tmp_path)
    live = from_peft(source, tasks=["a", "b"], n_skills=4, n_splits=2)
    model = source.get_base_model()
    stored_model = MODELS[form]()
    stored = from_peft(tmp_path, stored_model, tasks=["a", "b"], n_skills=4, n_splits=2)
    for own, adapter in ((model, live), (stored_model, stored)):
        assert (adapter.config.method, adapter.config.rank) == ("MHR", 3)
        with adapter.slots(["b", "a"]):
            assert torch.allclose(logits(own), wanted, rtol=0, atol=2e-5 * wanted.abs().max())
    losses = train(live, model, ["a", "b"])
    assert losses[-1] < losses[0]
    first = next(iter(live.inventory.parameters()))
    assert (first[:, :, 0] - first[:, :, 1]).abs().max() > 0  # equal skills have parted


@WITHOUT_OTHERS
@pytest.mark.parametrize("form", MODELS)
def test_several_loras_are_skills_that_tasks_start_from(form: str) -> None:
    sizes = {"one": (2, 4), "two": (3, 3), "three": (1, 2)}
    source = make_peft(form, sizes)
    wanted = {}
    for name in sizes:
        source.set_adapter(name)
        wanted[name] = logits(source)
    start = {"a": "two", "b": "three", "c": {"one": 3, "two": 1}}
    adapter = from_peft(source, tasks=["a", "b", "c", "d"], start=start, n_splits=2)
    model = source.get_base_model()
    for task, name in (("a", "two"), ("b", "three")):
        with adapter.slots([task]):
            off = (logits(model) - wanted[name]).abs().max() / wanted[name].abs().max()
        assert off < 3e-5, (task, off)
    weights_TGQS = torch.sigmoid(adapter.routing_logits.detach())
    weights_TGQS = weights_TGQS / weights_TGQS.sum(-1, keepdim=True)
    assert torch.allclose(weights_TGQS[2], torch.tensor([0.75, 0.25, 0.0]), atol=1e-6)
    assert torch.allclose(weights_TGQS[3], torch.full((3,), 1 / 3), atol=1e-3)
    losses = train(adapter, model, ["a", "d"])
    assert losses[-1] < losses[0]


@WITHOUT_OTHERS
def test_without_tasks_each_lora_is_one(tmp_path: Path) -> None:
    source = make_peft("causal", {"one": (2, 4), "two": (2, 4)}, ["q_proj", "v_proj"])
    source.save_pretrained(tmp_path)
    source.set_adapter("two")
    wanted = logits(source)
    model = MODELS["causal"]()
    folders = {name: tmp_path / name for name in ("one", "two")}
    adapter = from_peft(folders, model, granularity="model")
    assert adapter.task_names == ("one", "two")
    assert adapter.config.alpha == 4
    with adapter.slots(["two"]):
        assert torch.allclose(logits(model), wanted, rtol=0, atol=3e-5 * wanted.abs().max())


@WITHOUT_OTHERS
def test_what_cannot_be_one_inventory_is_one_line(tmp_path: Path) -> None:
    for name, targets in (("attention", ["q_proj", "v_proj"]), ("down", ["down_proj"])):
        make_peft("causal", {"default": (2, 2)}, targets).save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in ("attention", "down")}
    model = MODELS["causal"]()
    own = attach(MODELS["causal"](), AdapterConfig(n_skills=2), tasks=["x"])
    peft_folders.write_peft_poly(own, tmp_path / "poly", base_model=None)
    one = folders["attention"]
    refused: list[tuple[str, Any, dict[str, Any]]] = [
        ("need their backbone", (one,), {}),
        ("adapts other linears than 'attention', such as ", (folders, model), {}),
        ("made for another backbone", (one, small_causal("llama", hidden_size=64)), {}),
        ("Poly is no single LoRA", (tmp_path / "poly", model), {}),
        (
            "no LoRA 'atention'; did you mean 'attention'?",
            (one, model),
            {"start": {"a": "atention"}},
        ),
        ("start: 'b' is not among the tasks", (one, model), {"start": {"b": "attention"}}),
        ("no share of any", (one, model), {"start": {"a": {"attention": 0.0}}}),
    ]
    for text, arguments, options in refused:
        with pytest.raises((AdapterError, LayoutError)) as caught:
            from_peft(*arguments, tasks=["a"], **options)
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match="learns no routing that could start"):
        from_peft({"x": one, "y": one}, model, policy="uniform")
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
