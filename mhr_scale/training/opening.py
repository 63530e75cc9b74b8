"""Opening a training run: everything is validated first, then its parts are put together.

Shared by the verbs that train: the backbone, the adapter, the tokens and the sample stream of a
recipe, and the run folder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter
from mhr_scale.analysis.monitor import check_tasks, make_monitor
from mhr_scale.backbone.of_adapter import find_sites_of
from mhr_scale.config import PretrainConfig, ScheduleConfig
from mhr_scale.engine.ds_config import deepspeed_config
from mhr_scale.engine.opened import OpenedBackbone, PlacedBackbone, open_backbone
from mhr_scale.families.packed import Packed
from mhr_scale.rows.batching import Batch, StepBatches
from mhr_scale.rows.tokens import TokenSet, open_tokens
from mhr_scale.run import tracking
from mhr_scale.run.files import to_json_lines, write_json, write_text
from mhr_scale.run.run_folder import REJECTS, RunFolder
from mhr_scale.run.runlog import log, world_size
from mhr_scale.tasks.mixture import MixturePlan, Share
from mhr_scale.training import FREE, saved_steps
from mhr_scale.training.optim import has_row_gradients
from mhr_scale.training.starting import Start, check_start, load_start
from mhr_scale.training.trainer import Trainer


@contextmanager
def opened_training(
    config: PretrainConfig, *, start: Start | None = None, save_steps: tuple[int, ...] = ()
) -> Iterator[Trainer]:
    """A trainer inside the block, at the newest saved step of its run folder if there is one.

    Training begins with the tensors of `start`, if given, whose settings `config.adapter` has to
    repeat, and saves at `save_steps` in addition to the recipe's. Collective. No weight is read and
    nothing is written before recipe, folder, data and layout are validated.
    """
    folder = RunFolder(config.run.folder, PretrainConfig, free=FREE)
    is_begun = saved_steps.find_resume(folder.path) is not None
    check_folder(folder, config, is_begun=is_begun)
    config.batch.accumulation(world_size())
    tracking.check(config.run.trackers)
    opened = open_backbone(
        config.backbone,
        ds_config=config.run.ds_config,
        timeout_seconds=config.run.timeout_seconds,
        deterministic=config.run.deterministic,
        recipe=config,
    )
    opened.check_length(
        config.batch.max_input_tokens,
        config.batch.max_target_tokens,
        "batch.max_input_tokens and max_target_tokens",
    )
    opened.check_packing(config.batch.packing, "batch.packing")
    sites = find_sites_of(opened.blueprint, config.adapter)
    tokens = open_tokens(
        config.tasks,
        opened.tokenizer,
        config.batch,
        opened.family,
        cache=config.run.token_cache,
    )
    check_tasks(config, tokens)
    task_names = [card.name for card in tokens.cards]
    if start is not None:
        check_start(start, config.adapter, sites, task_names)
    inputs, origin = {**opened.inputs, **tokens.inputs}, {}
    if start is not None:
        origin = {"start": start.facts}
        inputs["adapter to start from"] = str(origin["start"]["content"])
    folder.check_inputs(inputs, is_begun=is_begun, holds="a run")
    plan = make_plan(config, tokens)
    with opened.placed(sites) as placed:
        adapter = Adapter(
            config.adapter,
            sites,
            task_names=task_names,
            seed=config.run.seed,
            row_gradients=has_row_gradients(config.optim),
        )
        adapter.bind(placed.adapted)
        if start is not None:
            log.info("starting from %s: %s", start.place, load_start(adapter, start))
        trainer = Trainer(
            config,
            placed=placed,
            adapter=adapter,
            tokens=tokens,
            batches=make_batches(config, placed, tokens, plan),
            backbone_facts=opened.facts,
            save_steps=save_steps,
            monitor=make_monitor(config, placed=placed, adapter=adapter, tokens=tokens),
        )
        trainer.resume()
        if placed.engine.rank == 0:
            folder.keep_recipe(config)
            folder.keep_inputs(inputs, is_begun=is_begun)
            rank0_record(folder, trainer, opened, origin)
        placed.engine.gather_barrier()
        yield trainer


def check_folder(
    folder: RunFolder[PretrainConfig], config: PretrainConfig, *, is_begun: bool
) -> None:
    """Raise `RunError` unless a run of this recipe may start or go on in its folder.

    More steps than stored are another recipe only where they would have changed those made so far.
    """
    stored = folder.read_recipe()
    way_out = "use another run.folder to start anew"
    if stored is not None and config.schedule.steps > stored.schedule.steps:
        reason = why_not_longer(stored.schedule, config.schedule)
        if reason is None:
            config = replace(config, schedule=stored.schedule)
        else:
            way_out = f"a run cannot be made longer where {reason}; {way_out}"
    folder.check(config, is_begun=is_begun, holds="a run", way_out=way_out)


def why_not_longer(stored: ScheduleConfig, longer: ScheduleConfig) -> str | None:
    """Why more steps under a schedule would change those made so far; None if they do not."""
    if stored.decay != "constant":
        return f"schedule.decay is {stored.decay}, which is over the number of steps"
    if stored.warmup != longer.warmup:
        return "schedule.warmup_fraction makes the warm-up longer too"
    if stored.anneal_routing_steps:
        return "schedule.anneal_routing_steps are the last ones"
    return None if replace(longer, steps=stored.steps) == stored else "the schedule is another one"


def make_plan(config: PretrainConfig, tokens: TokenSet) -> MixturePlan:
    """The sample stream over the tokenised rows of all tasks."""
    shares = [
        Share(name=card.name, size=card.n_train, cap=card.cap, weight=card.weight)
        for card in tokens.cards
    ]
    return MixturePlan(shares, config=config.mixture, seed=config.run.seed)


def make_batches(
    config: PretrainConfig, placed: PlacedBackbone, tokens: TokenSet, plan: MixturePlan
) -> StepBatches:
    """This rank's micro batches of any step."""
    family, model_config = placed.family, placed.model.config
    is_flat = placed.lays_flat(config.batch.packing, "batch.packing")

    def pack(batch: Batch) -> Packed:
        multiple = config.batch.pad_multiple
        return family.pack(batch, model_config, pad_multiple=multiple, is_flat=is_flat)

    return StepBatches(
        rows=tokens.train,
        plan=plan,
        config=config.batch,
        references=config.tasks.target_choice(),
        seed=config.run.seed,
        pack=pack,
        is_flat=is_flat,
        rank=placed.engine.rank,
        world_size=placed.engine.world_size,
    )


def rank0_record(
    folder: RunFolder[PretrainConfig],
    trainer: Trainer,
    opened: OpenedBackbone,
    facts: Mapping[str, Any],
) -> None:
    """Write DeepSpeed's configuration, the provenance and the rejected rows."""
    config, tokens = trainer.config, trainer.tokens
    merged = deepspeed_config(opened.ds_content, dtype=config.backbone.dtype)
    write_json(folder.path / "deepspeed.json", merged)
    folder.record_start(
        resumed_from=trainer.resume_step,
        packing=trainer.batches.is_flat,
        **trainer.engine.facts,
        backbone=trainer.backbone_facts,
        **facts,
        data={
            "tokens": tokens.fingerprint,
            "plan": trainer.batches.plan.fingerprint,
            **tokens.cuts.facts(),
        },
    )
    write_text(Path(folder.path / REJECTS), to_json_lines(tokens.rejects, ensure_ascii=False))
