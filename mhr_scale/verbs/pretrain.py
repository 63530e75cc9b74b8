"""The verb `pretrain`: a frozen backbone and a task mixture in, an adapter out."""

from pathlib import Path

from mhr_scale.adapters.layouts import Layout
from mhr_scale.backbone.of_adapter import open_adapter
from mhr_scale.config import PretrainConfig, precision_of
from mhr_scale.errors import AdapterError
from mhr_scale.run.repositories import pinned
from mhr_scale.run.run_folder import owned_folder
from mhr_scale.run.runlog import log, read_metric
from mhr_scale.run.streams import write_result
from mhr_scale.training import saved_steps
from mhr_scale.training.opening import opened_training
from mhr_scale.training.starting import Start
from mhr_scale.training.trainer import Trainer


def pretrain(config: PretrainConfig) -> Path:
    """Train an adapter on a mixture of tasks; returns the folder of the adapter.

    Collective: every rank calls it. The same command resumes from the last saved step.
    """
    with (
        owned_folder(config.run.folder),
        opened_training(config, start=start_of(config)) as trainer,
    ):
        announce(trainer)
        trainer.train()
        if trainer.engine.rank == 0:
            summarise(trainer)
    return Path(config.run.folder) / "adapter"


def start_of(config: PretrainConfig) -> Start | None:
    """The adapter to start from; None if there is none, or none is needed to go on."""
    if config.source is None or saved_steps.find_resume(Path(config.run.folder)) is not None:
        return None
    card, adapter = open_adapter(config.source)
    if "backbone" in card.origin:
        raise AdapterError(
            f"{config.source}: was trained together with the backbone's weights: over others it is "
            "worth nothing; start from another adapter"
        )
    named, own = card.backbone.get("name"), config.backbone.name
    if named and own and named != own:
        log.warning("%s: was trained on %s, and goes on here on %s", config.source, named, own)
    return Start(adapter=adapter, place=str(pinned(config.source)), step=card.step)


def announce(trainer: Trainer) -> None:
    """Log what is about to happen."""
    config, adapter = trainer.config, trainer.adapter
    cuts, facts = trainer.tokens.cuts, trainer.tokens.cuts.facts()
    log.info(
        "%d rows tokenised; inputs cut at %d tokens: %.1f %%, targets cut at %d: %.1f %%, "
        "dropped: %d, refused: %d",
        cuts.rows,
        config.batch.max_input_tokens,
        100 * facts["cut_input_share"],
        config.batch.max_target_tokens,
        100 * facts["cut_target_share"],
        cuts.dropped,
        len(trainer.tokens.rejects),
    )
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    frozen = config.backbone.name or "random weights"
    log.info(
        "%s, layout %s: %d linears, %s trainable numbers, %d tasks; backbone %s frozen in %s, "
        "%s on %d rank(s); %d steps of %d rows, %s, into %s",
        adapter.config.method,
        Layout.of(adapter.config).text,
        len(adapter.sites),
        f"{trainable:,}",
        len(adapter.task_names),
        frozen,
        precision_of(trainer.backbone_facts),
        trainer.engine.placement,
        trainer.engine.world_size,
        config.schedule.steps,
        config.batch.batch_size,
        "packed" if trainer.batches.is_flat else "padded",
        config.run.folder,
    )


def summarise(trainer: Trainer) -> None:
    """Print what was done and where the results are."""
    config, folder = trainer.config, trainer.folder
    losses = read_metric(folder / "metrics.jsonl", "validation_loss")
    lines = [
        f"Trained {config.adapter.method} on {len(trainer.adapter.task_names)} tasks for "
        f"{trainer.step} steps; the backbone stayed frozen."
    ]
    if len(losses) > 1:
        lines.append(
            f"Loss per target token on held-out rows of these tasks: {losses[0]:.4f} for "
            f"{config.source or 'the backbone alone'}, {losses[-1]:.4f} with the adapter."
        )
    lines += [
        f"  adapter  {folder / 'adapter'}",
        f"  numbers  {folder / 'metrics.jsonl'}",
        f"  recipe   {folder / 'config.yaml'} (as it ran), {folder / 'provenance.json'} (where it "
        "ran)",
    ]
    write_result("\n".join(lines) + "\n")
