"""Settings of `export`: what is exported, in which format, to which folder."""

from typing import Literal

from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part, recipe

#: The values of `what` that each format supports; None leaves the choice to the adapter.
SINGLES = (None, "average", "task", "soup", "whole")
EXPRESSIBLE = {
    "peft": (*SINGLES, "all_tasks"),
    "peft_poly": (None, "whole"),
    "merged": SINGLES,
    "native": (*SINGLES, "all_tasks", "clusters"),
    "serving": (None, "all_tasks"),
}


@part
class ClustersConfig:
    """Which tasks share a LoRA (docs/method.md 18)."""

    number: int
    """Clusters, of which each becomes a skill."""
    seed: int = 0
    """Seed of k-means, which begins several times."""
    logit: float = 20.0
    """Routing logit of a task for the skill it joined, and minus that for the others: 20 is that
    skill alone; where `pretrain` is to train the routing from here, 3 still has a gradient."""

    def __post_init__(self) -> None:
        if self.number < 2:
            raise ConfigError(f"clusters.number: {self.number} is not at least 2")
        if not 0.0 < self.logit <= 60.0:
            raise ConfigError(f"clusters.logit: {self.logit} is not in (0, 60]")


@recipe
class ExportConfig:
    """Everything `export` reads; the model part comes from the adapter."""

    adapter: str
    """A run, adapter or job folder, a PEFT LoRA, IA3 or Poly folder, or a published checkpoint; or
    one of these on the hub: `owner/name@revision`, and a folder or file in it after a `:`."""
    what: Literal["average", "task", "all_tasks", "soup", "clusters", "whole"] | None = None
    """average: the mean of the inventory; task: one training task under its routing; all_tasks: a
    folder for each; soup: the mean of some private adapters; clusters: a skill for each cluster of
    tasks whose private LoRAs are alike, and every task routed to its own; whole: the adapter as it
    is. null: whole for the formats that hold it (native, peft_poly) and for a single adapter, the
    task of an adapter that has only one (a finished job), else average."""
    task: str | None = None
    """The training task, for `what: task`."""
    tasks: tuple[str, ...] = ()
    """The training tasks whose private adapters are averaged, for `what: soup`. serving: the tasks
    that are served; empty: all."""
    also: tuple[str, ...] = ()
    """serving: further adapters and run folders of `adapt`, over the same backbone."""
    jobs: tuple[str, ...] = ()
    """serving: which finished jobs of run folders of `adapt`, by the ends of their names
    TASK/SEED/VARIANT (`MHR`, `0/MHR`), where `*` stands for anything (`TASK/*/MHR`); empty: all."""
    format: Literal["peft", "peft_poly", "merged", "native", "serving"] = "peft"
    """peft: a LoRA or IA3 folder; peft_poly: inventory and routing; merged: the backbone with the
    adapter added into its weights; native: this package's own artefact; serving: a LoRA for each
    task and each few-shot job in one folder, for vLLM and LoRAX (`adapter` may be a run folder of
    `adapt`)."""
    clusters: ClustersConfig | None = None
    """How tasks are clustered, for `what: clusters`."""
    max_loras: int | None = None
    """serving: how many different LoRAs a batch may mix, in the commands that start the servers;
    null: all, 16 at most."""
    folder: str
    """Where to write: a folder that is absent or empty; with `hub` also one that this recipe has
    written before, which is then pushed as it is."""
    hub: str | None = None
    """Where to push the folder once it is whole: `owner/name`, `owner/name@branch`, or a folder in
    it, `owner/name@branch:folder`; what is not there is made. The token is huggingface_hub's own
    (`hf auth login`, HF_TOKEN). null: nowhere."""
    hub_private: bool = True
    """Push to a private repository; false: make a new one public, or push to one that is."""
    hub_message: str | None = None
    """The message of the commit; null: what was exported, and from where."""
    licence: str | None = None
    """The licence in the model card, by its name on the hub (apache-2.0, mit, ..., other); null:
    the card says none."""
    licence_name: str | None = None
    """licence other: what it is called."""
    licence_link: str | None = None
    """licence other: where its text is."""
    backbone_moved_to: str | None = None
    """Where the adapter's backbone is now, if it has moved since training."""
    check: bool = True
    """Reload what was written and compare its logits, in float32 on the CPU, one
    module of the backbone in memory at a time."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """merged: data type of the written weights; null: what each tensor of the backbone has."""
    max_shard_bytes: int = 5_000_000_000
    """merged: largest size of one file; a larger tensor has a file of its own."""

    def __post_init__(self) -> None:
        if (self.what == "task") != (self.task is not None):
            raise ConfigError("task: name the training task for what: task, and only for it")
        is_serving = self.format == "serving"
        if (self.what == "soup") != bool(self.tasks) and not (is_serving and self.what != "soup"):
            raise ConfigError(
                "tasks: name training tasks for what: soup, and only for it and format: serving"
            )
        if (self.what == "clusters") != (self.clusters is not None):
            raise ConfigError("clusters: say how many for what: clusters, and only for it")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks: {list(self.tasks)} names a task twice")
        if self.what not in EXPRESSIBLE[self.format]:
            fitting = " or ".join(what for what in EXPRESSIBLE[self.format] if what)
            raise ConfigError(
                f"format: {self.format} cannot hold what: {self.what}; set what: {fitting}"
            )
        if self.dtype is not None and self.format != "merged":
            raise ConfigError("dtype: adapters are written in float32; only format merged reads it")
        if not is_serving and (self.also or self.jobs or self.max_loras is not None):
            raise ConfigError("also, jobs, max_loras: only format: serving reads them")
        if self.max_loras is not None and self.max_loras < 1:
            raise ConfigError(f"max_loras: {self.max_loras} is not at least 1")
        if (self.licence == "other") != bool(self.licence_name):
            raise ConfigError("licence_name: name the licence for licence: other, and only for it")
        if self.licence_link is not None and self.licence_name is None:
            raise ConfigError("licence_link: only licence: other has one; set licence_name too")
        if self.hub is None and (self.hub_message is not None or not self.hub_private):
            raise ConfigError("hub: names no repository, and hub_* say how to push; set hub")
        if self.max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes: {self.max_shard_bytes} is not at least 1")
