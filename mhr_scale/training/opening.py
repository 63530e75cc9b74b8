"""Opening a training run: everything that is checked at the door, then its parts put together.

What the verbs that train share: the backbone, the adapter, the tokens and the sample stream of a
recipe, and the run folder.
"""

from pathlib import Path
from typing import TypeVar

from mhr_scale.adapters import Adapter, attach
from mhr_scale.adapters.artefact import load_tensors, named_tensors
from mhr_scale.analysis.monitor import check_tasks, make_monitor
from mhr_scale.backbone import fingerprint
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.of_adapter import backbone_facts, check_adapter
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import PretrainConfig
from mhr_scale.engine.ds_config import check_quantise, deepspeed_config, read_ds_config
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import RunError
from mhr_scale.rows.batching import StepBatches
from mhr_scale.rows.tokens import TokenSet, open_tokens
from mhr_scale.run import tracking
from mhr_scale.run.files import to_json_lines, write_json, write_text
from mhr_scale.run.run_folder import check_writable, differences, listed, read_recipe, write_recipe
from mhr_scale.run.runlog import record_provenance, world_size
from mhr_scale.tasks.mixture import MixturePlan, Share
from mhr_scale.training import checkpoint
from mhr_scale.training.trainer import Trainer

T = TypeVar("T")

#: Settings that may differ when a run goes on: where and how fast, not what.
FREE_TO_CHANGE = (
    "run.ds_config",
    "run.save_every",
    "run.keep",
    "run.keep_best",
    "run.log_every",
    "run.validate_every",
    "run.timeout_seconds",
    "run.folder",
    "batch.micro_batch_size",
    "batch.workers",
    "run.token_cache",
    "run.trackers",
    "backbone.recompute",
    "monitor.alignment_every",
    "monitor.alignment_tasks",
    "monitor.alignment_rows",
)


def prepare(
    config: PretrainConfig, *, start: Adapter | None = None, save_steps: tuple[int, ...] = ()
) -> Trainer:
    """Check everything at the door, then build the backbone, the adapter and their trainer.

    Training starts from the tensors of `start`, if given, whose settings `config.adapter` has to
    repeat, and saves at `save_steps` besides what the recipe says. Collective. Nothing is written;
    no weight is read before recipe, data and layout are found good.
    """
    ds_content = read_ds_config(config.run.ds_config)
    config.batch.accumulation(world_size())
    check_folder(config)
    tracking.check(config.run.trackers)
    blueprint = read_blueprint(config.backbone)
    check_quantise(config.backbone, blueprint, ds_content, config.run.ds_config)
    check_adapter(blueprint, config.adapter)
    tokenizer = load_tokenizer(config.backbone, blueprint)
    tokens = open_tokens(config.tasks, tokenizer, config.batch, cache=config.run.token_cache)
    check_tasks(config, tokens)
    plan = make_plan(config, tokens)
    engine = Engine(ds_content, timeout_seconds=config.run.timeout_seconds)
    try:
        model = engine.build(config.backbone, blueprint)
        names = [card.name for card in tokens.cards]
        adapter = attach(model, config.adapter, tasks=names, seed=config.run.seed)
        if start is not None:
            load_tensors(adapter, named_tensors(start), place="the adapter to start from")
        model = engine.prepare(model, config.backbone)
        fingerprint.check(model, blueprint, config.backbone, engine)
        return Trainer(
            config,
            engine=engine,
            model=model,
            adapter=adapter,
            tokens=tokens,
            batches=StepBatches(
                rows=tokens.train,
                plan=plan,
                config=config.batch,
                references=config.tasks.target_choice(),
                seed=config.run.seed,
                pad_id=tokenizer.pad_token_id,
                rank=engine.rank,
                world_size=engine.world_size,
            ),
            backbone_facts=backbone_facts(config.backbone, blueprint),
            save_steps=save_steps,
            monitor=make_monitor(
                config,
                engine=engine,
                model=model,
                adapter=adapter,
                tokens=tokens,
                pad_id=tokenizer.pad_token_id,
            ),
        )
    except BaseException:
        engine.close()
        raise


def make_plan(config: PretrainConfig, tokens: TokenSet) -> MixturePlan:
    """The sample stream over the tokenised rows of all tasks."""
    shares = [
        Share(name=card.name, size=card.n_train, cap=card.cap, weight=card.weight)
        for card in tokens.cards
    ]
    return MixturePlan(shares, config=config.mixture, seed=config.run.seed)


def check_folder(config: PretrainConfig) -> None:
    """Raise `RunError` if the run folder holds a run with other settings."""
    path = Path(config.run.folder)
    stored_path = path / "config.yaml"
    check_writable(path)
    if not stored_path.exists():
        if path.is_dir() and checkpoint.find_resume(path) is not None:
            raise RunError(f"{path}: saved steps but no config.yaml; use another run.folder")
        return
    changed = [
        difference
        for key, difference in differences(read_recipe(PretrainConfig, stored_path), config)
        if key not in FREE_TO_CHANGE
    ]
    if changed and checkpoint.find_resume(path) is not None:
        raise RunError(
            f"{path}: holds a run with other settings ({listed(changed)}); use another run.folder "
            "to start anew"
        )


def rank0_open_folder(trainer: Trainer) -> None:
    """Write what a reader of the run needs before its first number."""
    config, folder = trainer.config, trainer.folder
    write_recipe(folder / "config.yaml", config)
    ds_content = read_ds_config(config.run.ds_config)
    write_json(folder / "deepspeed.json", deepspeed_config(ds_content, dtype=config.backbone.dtype))
    record_provenance(
        folder / "provenance.json",
        resumed_from=trainer.resume_step,
        world_size=trainer.engine.world_size,
        device=str(trainer.engine.device),
        placement=trainer.engine.placement,
        backbone=trainer.backbone_facts,
        data={
            "tokens": trainer.tokens.fingerprint,
            "plan": trainer.batches.plan.fingerprint,
            **trainer.tokens.cuts.facts(),
        },
    )
    rejects = to_json_lines(trainer.tokens.rejects, ensure_ascii=False)
    write_text(folder / "rejects.jsonl", rejects)
