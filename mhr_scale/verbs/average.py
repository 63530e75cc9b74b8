"""The verb `average`: an inventory in, its mean as one ordinary adapter out.

Extra steps continue on the training mixture of the source run (docs/method.md 9) with a fresh
optimizer and a schedule over the largest number of steps. The averaged adapter is written after
every number of steps in the list, so that one run gives all columns of a table. A plain LoRA can be
given the same steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.config import AverageConfig, PretrainConfig, ScheduleConfig
from mhr_scale.errors import RunError, some
from mhr_scale.recipe.reading import load, overrides_of
from mhr_scale.run import repositories
from mhr_scale.run.run_folder import RECIPE, RunFolder, owned_folder
from mhr_scale.run.runlog import log, rank
from mhr_scale.run.streams import write_result
from mhr_scale.training import saved_steps
from mhr_scale.training.opening import opened_training
from mhr_scale.training.starting import Start

#: Settings that may change between two starts; the training checks its own.
FREE = ("run.", "tasks", "tasks.", "backbone_moved_to")


def average(config: AverageConfig) -> Path:
    """Write the averaged adapter of every number of extra steps; returns the last one's folder.

    Collective where there are extra steps; without them rank 0 works alone, and neither a backbone
    nor DeepSpeed is needed.
    """
    with owned_folder(config.run.folder):
        return average_run(config)


def average_run(config: AverageConfig) -> Path:
    """Write the averaged adapters, in a folder that this launch owns. Collective."""
    card, source = artefact.read(config.source)
    run = RunFolder(config.run.folder, AverageConfig, free=FREE, recipe="average.yaml")
    folder = run.path
    is_begun = (folder / "averaged").exists()
    inputs = {"source": artefact.digest(source), **repositories.commits(config.source)}
    if config.steps[-1] == 0 or not (folder / RECIPE).exists():  # else the training checks it
        run.check(config, is_begun=is_begun, holds="averages", way_out="use another run.folder")
    run.check_inputs(inputs, is_begun=is_begun, holds="averages")
    if config.steps[-1]:
        continue_training(config, card, source)
    if rank() == 0:
        run.keep_recipe(config)
        run.keep_inputs(inputs, is_begun=True)
        for steps in config.steps:
            trained = (
                source if steps == 0 else artefact.load(saved_steps.step_folder(folder, steps))
            )
            facts: dict[str, Any] = {
                "averaged_from": repositories.pinned(config.source),
                "extra_steps": steps,
                "trainable": config.trainable,
            }
            if steps:
                facts["seed"] = config.run.seed
                facts["schedule_steps"] = config.steps[-1]
                facts["warmup_fraction"] = config.warmup_fraction
            targets = [folder / "averaged" / f"{steps:06d}"]
            targets += [folder / "adapter"] if steps == config.steps[-1] else []
            mean = mean_of(trained)
            for target in targets:
                artefact.save(mean, target, step=steps, backbone=card.backbone, origin=facts)
        write_result(f"averaged adapters of {list(config.steps)} extra steps in {folder}\n")
    return folder / "adapter"


def continue_training(config: AverageConfig, card: Card, source: Adapter) -> None:
    """Train the mean, or the inventory under uniform routing, on the source run's own mixture.

    Collective. Resumes from the last saved step, as `pretrain` does. A backbone of the hub is the
    source run's commit of it.
    """
    recipe_file = repositories.last_found(config.source).path / RECIPE
    if not recipe_file.is_file():
        raise RunError(
            f"{recipe_file}: missing; extra steps go on with the source run's own tasks, so name "
            "its run folder, not its adapter"
        )
    begun = mean_of(source) if config.trainable == "mean" else under_uniform_routing(source)
    extra = config.steps[-1]
    moved = overrides_of("tasks", config.tasks)
    if config.backbone_moved_to is not None:
        moved += overrides_of("backbone", {"name": config.backbone_moved_to, "revision": None})
    elif "commit" in card.backbone:
        moved += overrides_of("backbone", {"revision": card.backbone["commit"]})
    recipe = replace(
        load(PretrainConfig, recipe_file, moved),
        adapter=begun.config,
        schedule=ScheduleConfig(steps=extra, warmup_fraction=config.warmup_fraction),
        run=config.run,
    )
    start = Start(adapter=begun, place=str(repositories.pinned(config.source)))
    save_steps = tuple(steps for steps in config.steps if steps)
    with opened_training(recipe, start=start, save_steps=save_steps) as trainer:
        check_same_tasks(config, source, [card.name for card in trainer.tokens.cards])
        log.info("%d extra steps of the %s on %s", extra, config.trainable, config.source)
        trainer.train()


def check_same_tasks(config: AverageConfig, source: Adapter, names: Sequence[str]) -> None:
    """Raise `RunError` if tasks under other settings are not those of the source run."""
    odd = sorted(set(names) ^ set(source.task_names))
    if config.tasks is not None and odd and len(source.task_names) > 1:
        raise RunError(
            f"tasks: not the tasks that {config.source} was trained on: only one of the two has "
            f"{some(odd, shown=5)}; extra steps go on with the same ones"
        )


def under_uniform_routing(source: Adapter) -> Adapter:
    """The same inventory with constant weights 1 / S in place of its routing."""
    if not source.config.is_routed:
        return source
    uniform = Adapter(
        replace(source.config, policy="uniform"), source.sites, task_names=source.task_names
    )
    tensors = dict(source.inventory.named_tensors())
    artefact.load_tensors(uniform, tensors, place="the inventory")
    return uniform
