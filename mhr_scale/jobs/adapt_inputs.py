"""The inputs of a run of few-shot jobs, read and validated before any weight is read."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.sites import Site
from mhr_scale.backbone.blueprint import make_model
from mhr_scale.backbone.of_adapter import backbone_of, check_fit, find_sites_of, open_adapter
from mhr_scale.config import AdaptConfig, BackboneConfig
from mhr_scale.engine.opened import OpenedBackbone, open_backbone
from mhr_scale.errors import ConfigError
from mhr_scale.jobs import soup
from mhr_scale.jobs.full import check_backbone_jobs
from mhr_scale.jobs.job import Job, check_folders
from mhr_scale.jobs.job_data import JobData, open_data
from mhr_scale.jobs.scheduling import JobEstimate
from mhr_scale.jobs.start import check_variant
from mhr_scale.run import repositories
from mhr_scale.scores.questions import LENGTHS, longest
from mhr_scale.tasks.suites import read_few_shot
from mhr_scale.tasks.task import Intake


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptInputs:
    """Sources, backbone, data and jobs, all validated."""

    config: AdaptConfig
    sources: dict[str, Adapter]
    backbone: OpenedBackbone
    sites: dict[str, tuple[Site, ...]]
    data: dict[tuple[str, int], JobData]
    intake: Intake
    jobs: list[Job]
    precisions: dict[str, str] = field(default_factory=dict)
    """In which data types the sources were stored."""

    def source(self, variant: str) -> Adapter | None:
        """The adapter a variant starts from; None if it is fresh."""
        path = self.config.variants[variant].adapter
        return None if path is None else self.sources[path]

    @property
    def contents(self) -> dict[str, str]:
        """What the jobs read, by content (`RunFolder.check_inputs`)."""
        adapters = {
            f"adapter {repositories.name_of(path)}": artefact.digest(source)
            for path, source in self.sources.items()
        }
        rows = {f"rows of {task}, seed {s}": data.digest for (task, s), data in self.data.items()}
        return {**self.backbone.inputs, **adapters, **repositories.commits(*self.sources), **rows}

    def steps(self, job: Job) -> int:
        """Optimizer steps of a job."""
        return self.config.variants[job.variant].steps or self.config.protocol.steps

    def estimate(self, job: Job, *, step: int) -> JobEstimate:
        """The estimated work of a job from `step` on."""
        data = self.data[job.task, job.seed]
        width, depth = data.shape
        scored = sum(len(row.input_ids) + row.n_answer_tokens for row in data.test.rows)
        return JobEstimate(
            job=job,
            step=step,
            steps=self.steps(job),
            batch_size=data.batch_size,
            width=width,
            depth=depth,
            scored_tokens=scored,
        )

    def keep_rows(self, jobs: Iterable[Job]) -> None:
        """Forget the rows, texts and token ids, of all jobs but these: others run on other ranks.

        Estimates and `contents` need them all, so they have to be made before.
        """
        kept = {(job.task, job.seed) for job in jobs}
        for key in self.data.keys() - kept:
            del self.data[key]

    def list_sites(self) -> list[Site]:
        """Every linear that some variant adapts, in the order of the model."""
        with torch.device("meta"):
            model = make_model(self.backbone.blueprint)
        known = {site.name: site for sites in self.sites.values() for site in sites}
        return [known[name] for name, _ in model.named_modules() if name in known]


def open_jobs(config: AdaptConfig) -> AdaptInputs:
    """Read and check sources, backbone, tasks and variants; no weight is read."""
    paths = list(dict.fromkeys(v.adapter for v in config.variants.values() if v.adapter))
    opened = {path: open_adapter(path, config.backbone_moved_to) for path in paths}
    sources = {path: adapter for path, (_, adapter) in opened.items()}
    for name, variant in config.variants.items():
        check_variant(name, variant, sources[variant.adapter] if variant.adapter else None)
        if variant.kind == "soup":
            soup.find_recipe(str(variant.adapter))
    backbone = open_backbone(
        one_backbone(config, {path: card for path, (card, _) in opened.items()}),
        ds_config=config.run.ds_config,
        timeout_seconds=config.run.timeout_seconds,
        deterministic=config.run.deterministic,
        recipe=config,
        adapter=None if config.backbone is not None or not paths else paths[0],
    )
    check_backbone_jobs(config, backbone)
    backbone.check_length(
        config.protocol.max_input_tokens,
        config.protocol.max_target_tokens,
        "protocol.max_input_tokens and max_target_tokens",
    )
    backbone.check_packing(config.waves.packing, "waves.packing")
    backbone.check_packing(config.scoring.packing, "scoring.packing")
    for path, (card, _) in opened.items():
        check_fit(path, card, backbone.blueprint)
    sites = {}
    for name, variant in config.variants.items():
        if variant.adapter:
            sites[name] = sources[variant.adapter].sites
        else:
            assert variant.fresh is not None
            sites[name] = find_sites_of(backbone.blueprint, variant.fresh)
    data: dict[tuple[str, int], JobData] = {}
    intake = Intake()
    for seed in config.shots.seeds:
        few_shot, intake = read_few_shot(
            config.tasks, config.shots, seed=seed, examples=config.scoring.examples
        )
        for task in few_shot:
            rows = open_data(task, config, backbone.tokenizer, backbone.family)
            data[task.task.name, seed] = rows
            backbone.check_length(*longest(rows.test.rows, config.scoring), LENGTHS)
    check_folders(dict.fromkeys(task for task, _ in data), what="tasks")
    check_folders(config.variants, what="variants")
    jobs = [
        Job(task=task, seed=seed, variant=variant)
        for (task, seed), variant in itertools.product(data, config.variants)
    ]
    return AdaptInputs(
        config=config,
        sources=sources,
        precisions={path: card.precision for path, (card, _) in opened.items()},
        backbone=backbone,
        sites=sites,
        data=data,
        intake=intake,
        jobs=jobs,
    )


def one_backbone(config: AdaptConfig, cards: Mapping[str, Card]) -> BackboneConfig:
    """The common backbone of all variants; raises `ConfigError` if they have several."""
    backbones = {
        path: backbone_of(path, card, config.backbone_moved_to) for path, card in cards.items()
    }
    if config.backbone is not None:
        backbones["backbone"] = config.backbone
    if not backbones:
        raise ConfigError("backbone: required where every variant is fresh")
    if config.backbone is None and config.backbone_dtype is None:
        dtypes = {backbone.dtype for backbone in backbones.values()}
        if len(dtypes) > 1:
            raise ConfigError(
                f"variants: adapters trained over {' and '.join(sorted(dtypes))} backbones; set "
                "backbone_dtype"
            )
    (first, chosen), *others = backbones.items()
    for path, other in others:
        are_told = None not in (other.revision, chosen.revision)  # older cards say none
        if (other.name, other.config, other.config_seed) != (
            chosen.name,
            chosen.config,
            chosen.config_seed,
        ) or (are_told and other.revision != chosen.revision):
            known, found = (repositories.joined(b.name or "", b.revision) for b in (chosen, other))
            raise ConfigError(
                f"variants: {first} was trained on {known or 'random weights'}, {path} on "
                f"{found or 'other random weights'}; jobs of one run share a backbone: make "
                "two runs, or set backbone_moved_to if it is the same one in two places"
            )
    chosen = config.backbone or chosen
    if chosen.dropout != 0.0:
        rate = "null, the backbone's own rate" if chosen.dropout is None else chosen.dropout
        raise ConfigError(
            f"backbone.dropout: {rate}; jobs that share a pass would share its random "
            "numbers too: set it to 0"
        )
    chosen = replace(
        chosen,
        dtype=config.backbone_dtype or chosen.dtype,
        quantise=config.backbone_quantise or chosen.quantise,
    )
    if config.backbone_variants and chosen.quantise != "none":
        raise ConfigError(
            f"variants.{config.backbone_variants[0]}.kind: backbone trains weights, which "
            f"{chosen.quantise} ones cannot be; set backbone_quantise: none for all variants"
        )
    return chosen
