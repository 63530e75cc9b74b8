"""transformers' Trainer over routed adapters: a column of task names, our slots and backward.

`RoutedTrainer` is the Trainer itself; `Routed` in front of a subclass of it, such as TRL's
`SFTTrainer`, does the same there. Loss, its normalisation over accumulated batches, clipping,
schedule, logging and checkpoints are the Trainer's; checkpoints hold the adapter, no backbone.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.slots import Slots
from mhr_scale.errors import AdapterError, DataError, EngineError, shortened, suggest

#: The adapter's name in the model while the Trainer trains what it finds there.
MEMBER = "mhr_scale_adapter"
#: Data types of frozen weights that an adapter's card can name.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

if TYPE_CHECKING:  # what `Routed` stands in front of
    from transformers import Trainer as Base
else:
    Base = object


class Routed(Base):
    """In front of a Trainer, makes it train an adapter: `class Mine(Routed, SFTTrainer): pass`."""

    args: Any
    model: Any
    optimizer: Any
    data_collator: Any

    def __init__(
        self,
        model: nn.Module,
        *arguments: Any,
        adapter: Adapter,
        task_column: str = "task",
        routing_lr: float | None = None,
        **options: Any,
    ) -> None:
        """Take the Trainer's arguments, and an adapter that is attached to the model.

        `task_column` names the task of each row, by name or number. `routing_lr` is the peak rate
        of the routing logits (default: `learning_rate`, that of the inventory). Raises
        `AdapterError` if the adapter sits in another model, `DataError` for rows of unknown tasks
        or without one, `EngineError` for several processes or GPUs.
        """
        _check_attached(adapter, model)
        self.adapter = adapter
        self.task_column = task_column
        self.routing_lr = routing_lr
        for name in ("train_dataset", "eval_dataset"):
            self._check_rows(options.get(name), name)
        super().__init__(model, *arguments, **options)
        n_gpus, kind = self.args.n_gpu, self.accelerator.distributed_type.value
        if self.args.world_size > 1 or n_gpus > 1 or kind != "NO":
            raise EngineError(
                f"RoutedTrainer trains in one process on one device, not on {n_gpus} GPUs of "
                f"{self.args.world_size} processes ({kind}); set CUDA_VISIBLE_DEVICES=0, or use "
                "`pretrain`, which trains on many"
            )
        adapter.to(adapter.linears[0].weight.device)
        self.data_collator = TaskCollator(self.data_collator, task_column, adapter.task_names)

    def _check_rows(self, rows: Any, what: str) -> None:
        """Raise `DataError` for a dataset whose column of tasks is missing or names none."""
        for name, part in rows.items() if type(rows) is dict else ((what, rows),):
            columns = getattr(part, "column_names", None)
            if columns is None:  # no table: its rows are looked at when they come
                continue
            if self.task_column not in columns:
                raise DataError(
                    f"{name}: no column '{self.task_column}' that names each row's task"
                    f"{suggest(self.task_column, columns)}; set task_column"
                )
            if hasattr(part, "unique"):
                known = self.adapter.task_names
                check_tasks(part.unique(self.task_column), known, f"{name}: a row")

    # -- steps -----------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Tensor:
        """The Trainer's own step under the slots of its rows' tasks."""
        model.train()  # policies that draw numbers do so in training mode
        slots, rest = self._fill(inputs)
        with slots, slots.collecting():
            loss: Tensor = super().training_step(model, rest, *arguments, **options)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Any:
        """The same for evaluation."""
        model.eval()
        slots, rest = self._fill(inputs)
        with slots:
            return super().prediction_step(model, rest, *arguments, **options)

    def _fill(self, inputs: dict[str, Any]) -> tuple[Slots, dict[str, Any]]:
        """The slots of a batch, and the batch without its tasks."""
        rest = dict(inputs)
        tasks = rest.pop(self.task_column)
        beams = getattr(self.args, "generation_num_beams", None) or 1
        with torch.set_grad_enabled(self.model.training), self.accelerator.autocast():
            return self.adapter.slots(tasks, rows_per_example=beams), rest

    # -- what is trained -------------------------------------------------------------------------

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train; the adapter is among the model's parameters for so long."""
        self.model.add_module(MEMBER, self.adapter)
        try:
            return super().train(*arguments, **options)
        finally:
            delattr(self.model, MEMBER)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer of `args`, with the groups inventory and routing; only that one decays."""
        if self.optimizer is not None:
            return self.optimizer
        if self.optimizer_cls_and_kwargs is not None:
            kind, options = self.optimizer_cls_and_kwargs
        else:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.adapter)
        inventory = list(self.adapter.inventory.parameters())
        decay = self.args.weight_decay
        groups = [{"params": inventory, "weight_decay": decay, "name": "inventory"}]
        logits = self.adapter.routing_logits
        if logits is not None and logits.requires_grad:
            rate = self.args.learning_rate if self.routing_lr is None else self.routing_lr
            group = {"params": [logits], "lr": rate, "weight_decay": 0.0, "name": "routing"}
            groups.append(group)
        self.optimizer = kind(groups, **options)
        return self.optimizer

    # -- data ------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.task_column not in self._signature_columns:
            self._signature_columns.append(self.task_column)

    # -- checkpoints -----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter where the Trainer would write the model."""
        folder = Path(output_dir or self.args.output_dir)
        config = self.model.config
        facts = {
            "name": getattr(config, "_name_or_path", ""),
            "dtype": DTYPES.get(self.model.dtype),
        }
        known = {key: value for key, value in facts.items() if value} if facts["name"] else {}
        artefact.save(self.adapter, folder, step=self.state.global_step, backbone=known)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_adapter(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_adapter(Path(self.state.best_model_checkpoint))

    def _load_adapter(self, folder: Path) -> None:
        card, stored = artefact.read(folder)
        adapter = self.adapter
        own = (adapter.config, adapter.sites, adapter.task_names)
        if (card.adapter, card.sites, card.task_names) != own:
            raise AdapterError(
                f"{folder}: another adapter than the one that is trained (settings, linears or "
                "tasks differ); start in another output_dir"
            )
        artefact.load_tensors(adapter, artefact.named_tensors(stored), place=str(folder))


class RoutedTrainer(Routed, Trainer):
    """transformers' Trainer that trains an adapter of many tasks."""


class TaskCollator:
    """A collator that hands on the tasks of its rows, which no tensor can hold."""

    def __init__(
        self, collate: Callable[[list[Any]], dict[str, Any]], column: str, known: Sequence[str]
    ) -> None:
        self.collate, self.column, self.known = collate, column, known
        self.tokenizer = getattr(collate, "tokenizer", None)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate the rows without their tasks, and put those beside."""
        tasks = [row.get(self.column) for row in rows]
        check_tasks(tasks, self.known, f"column '{self.column}': a row")
        rest = [{name: row[name] for name in row if name != self.column} for row in rows]
        return {**self.collate(rest), self.column: tasks}


def check_tasks(tasks: Iterable[Any], known: Sequence[str], place: str) -> None:
    """Raise `DataError` for what is neither the name nor the number of a known task."""
    for task in tasks:
        if task is None or task == "":
            raise DataError(f"{place} has no task; give each the name of one, or leave it out")
        is_known = task in known if isinstance(task, str) else task in range(len(known))
        if not is_known:
            hint = suggest(str(task), known)
            raise DataError(f"{place} has task {shortened(str(task))}, not in the adapter{hint}")


def _check_attached(adapter: Adapter, model: nn.Module) -> None:
    """Raise `AdapterError` unless the adapter's linears are those of the model."""
    adapter.users()
    linear = dict(model.named_modules()).get(adapter.sites[0].name)
    if linear is not adapter.linears[0]:
        raise AdapterError(
            "the adapter is attached to another model than the one that is trained; attach it: "
            "adapter = attach(model, ...), or load_adapter(folder, model=model)"
        )
