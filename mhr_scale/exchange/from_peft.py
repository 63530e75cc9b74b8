"""LoRAs that PEFT has trained, as the skills of an inventory to train on from.

Shape letters: G routing groups, Q splits, S skills, I and O features, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mhr_scale.adapters import Adapter, attach, peft_folders
from mhr_scale.adapters.artefact import Card, check_backbone
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.library import at_one_rank, is_single_lora
from mhr_scale.errors import AdapterError, ConfigError, suggest

#: Folders of LoRAs by name.
Folders: TypeAlias = Mapping[str, Path | str]
#: By task, the LoRA it starts from, or shares of several.
Start: TypeAlias = Mapping[str, str | Mapping[str, float]]
#: What is added to a share of zero: a routing logit has to be able to leave where it starts.
LEAST = 1e-7


def from_peft(
    source: Any,
    model: nn.Module | None = None,
    *,
    tasks: Sequence[str] | None = None,
    start: Start | None = None,
    n_skills: int = 8,
    n_splits: int = 1,
    **settings: Any,
) -> Adapter:
    """An adapter over PEFT's LoRAs, attached to their backbone.

    `source` is a live `PeftModel`, whose LoRAs leave it (`model` stays out; the backbone is
    `source.get_base_model()` as before), or the folder of a LoRA, or several by name; then `model`
    is the backbone. Linears, rank and alpha are theirs; `n_splits` and `settings` (granularity,
    policy, ...) are those of `AdapterConfig`.

    One LoRA becomes `n_skills` equal skills: every task computes what it computed, and skills part
    as soon as tasks route differently. Several are one skill each; `start` says what a task starts
    from: one LoRA by name (the shares of others are 1e-7), or shares, which are made to sum to 1
    and mix A and B apart. A task that `start` leaves out has equal shares. Without `tasks` each
    LoRA is a task that starts from itself. Raises `AdapterError` for what cannot be one inventory.
    """
    if hasattr(source, "peft_config") and hasattr(source, "unload"):
        if model is not None:
            raise AdapterError("a PeftModel brings its own backbone; leave `model` out")
        loras = _take_off(source)
        model = source.unload()
    else:
        if model is None:
            raise AdapterError("LoRAs in folders need their backbone: from_peft(folder, model)")
        folders = source if isinstance(source, Mapping) else {Path(source).name: source}
        loras = _read(folders, model)
    assert model is not None
    for name, (card, _) in loras.items():
        check_backbone(Path(card.origin.get("path", name)), card, model)
    skills, config = _align({name: adapter for name, (_, adapter) in loras.items()})
    names = list(skills)
    if tasks is None:
        tasks = names
        start = {name: name for name in names} if start is None else start
    shares = _shares(start or {}, tasks, names)
    if len(names) == 1:
        skills = {f"{names[0]} {n}": skills[names[0]] for n in range(n_skills)}
        shares = {}
    config = replace(config, n_skills=len(skills), n_splits=n_splits, **settings)
    if shares and not config.has_logits:
        raise ConfigError(f"policy '{config.policy}' learns no routing that could start somewhere")
    adapter = attach(model, config, tasks=list(tasks))
    _fill(adapter, list(skills.values()), shares)
    return adapter


def _take_off(source: Any) -> dict[str, tuple[Card, Adapter]]:
    """The LoRAs of a live model, by way of the files that PEFT would write."""
    names = list(source.peft_config)
    with TemporaryDirectory() as folder:
        source.save_pretrained(folder, selected_adapters=names, save_embedding_layers=False)
        folders = {name: Path(folder, "" if name == "default" else name) for name in names}
        return _read(folders, source.get_base_model())


def _read(folders: Folders, model: nn.Module) -> dict[str, tuple[Card, Adapter]]:
    """Folders of single LoRAs by name; what they do not tell, the model's configuration does."""

    def sizes(name: str | None, *, is_needed: bool) -> dict[str, Any]:
        raw: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
        return raw

    if not folders:
        raise AdapterError("no LoRA to start from; name at least one folder")
    loras = {}
    for name, folder in folders.items():
        card, adapter = peft_folders.open_adapter(folder, sizes=sizes)
        config = adapter.config
        if not is_single_lora(config):
            raise AdapterError(
                f"{folder}: {config.method} is no single LoRA, which alone can be a skill; average "
                "it, or collapse one of its tasks"
            )
        loras[name] = (card, adapter)
    return loras


def _align(adapters: Mapping[str, Adapter]) -> tuple[dict[str, dict[str, Tensor]], AdapterConfig]:
    """The tensors of each LoRA at one rank and scale, and the settings they have in common."""
    first = next(iter(adapters))
    sites = adapters[first].sites
    for name, adapter in adapters.items():
        if adapter.sites != sites:
            odd = sorted({site.name for site in adapter.sites} ^ {site.name for site in sites})
            raise AdapterError(
                f"LoRA '{name}' adapts other linears than '{first}', such as "
                f"{odd[0] if odd else 'those of another width'}; skills are of the same ones"
            )
    config, skills = at_one_rank(list(adapters.values()))
    return dict(zip(adapters, skills, strict=True)), config


def _shares(start: Start, tasks: Sequence[str], names: Sequence[str]) -> dict[str, list[float]]:
    """Each task's shares of the LoRAs, where it has a start of its own."""
    found = {}
    for task, wanted in start.items():
        if task not in tasks:
            raise AdapterError(f"start: '{task}' is not among the tasks{suggest(task, tasks)}")
        by_name = {wanted: 1.0} if isinstance(wanted, str) else wanted
        for name, share in by_name.items():
            if name not in names:
                raise AdapterError(f"start: task '{task}': no LoRA '{name}'{suggest(name, names)}")
            if not 0.0 <= share < float("inf"):
                raise AdapterError(f"start: task '{task}': a share of {share} for '{name}'")
        if not sum(by_name.values()):
            raise AdapterError(f"start: task '{task}' has no share of any LoRA")
        found[task] = [float(by_name.get(name, 0.0)) for name in names]
    return found


@torch.no_grad()
def _fill(
    adapter: Adapter, skills: Sequence[Mapping[str, Tensor]], shares: Mapping[str, list[float]]
) -> None:
    """Copy the skills, split by split, and let routing start at the shares.

    Weights are sigmoid(z) over their sum: the largest share has z = 0, where the gradient is large.
    """
    for key, tensor_QS in adapter.inventory.named_tensors():
        n_splits, n_skills = tensor_QS.shape[:2]
        for number, skill in zip(range(n_skills), skills, strict=True):
            whole, axis = skill[key][0, 0], 0 if key.endswith(".A") else 1
            parts = whole.chunk(n_splits, axis)
            tensor_QS[:, number].copy_(torch.stack(parts))
    logits_TGQS = adapter.routing_logits
    for task, share in shares.items():
        assert logits_TGQS is not None
        weights_S = torch.tensor(share, dtype=torch.float64)
        weights_S = (weights_S / weights_S.max()).clamp(min=LEAST)
        sigmoids_S = 0.5 * weights_S
        logits_S = (sigmoids_S / (1.0 - sigmoids_S)).log()
        logits_TGQS[adapter.task_names.index(task)] = logits_S.to(logits_TGQS)
