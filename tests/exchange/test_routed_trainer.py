"""transformers' Trainer over an adapter: our own loop's numbers, checkpoints, refusals."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small_causal import small_causal
from small_t5 import small_t5
from transformers import ByT5Tokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from mhr_scale import AdapterConfig, RoutedTrainer, attach, load_adapter
from mhr_scale.errors import AdapterError, DataError
from mhr_scale.exchange.routed_trainer import Routed
from mhr_scale.families.packed import IGNORE

CONFIG = AdapterConfig(rank=2, n_skills=3, n_splits=2)
TASKS = ("copy", "sort", "count")
STEPS, PER_STEP, ACCUMULATION = 20, 3, 2
RATES = {"learning_rate": 1e-2, "routing_lr": 1e-1}


class Padder:
    """Rows to tensors, without a tokenizer."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value
            )
            for name, value in fill.items()
        }


def make_rows(is_causal: bool) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(STEPS * PER_STEP * ACCUMULATION):
        length, answer = 5 + number % 4, 1 + number % 3
        ids = torch.randint(3, 96, (length + answer,), generator=generator).tolist()
        labels = [IGNORE] * length + ids[length:]
        if not is_causal:
            ids, labels = ids[:length], ids[length:]
        mask = [1] * len(ids)
        task = TASKS[number % 3 if number % 5 else 0]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "task": task})
    return Dataset.from_list(rows)


def attached(is_causal: bool) -> tuple[Any, Any]:
    model = small_causal("llama") if is_causal else small_t5(dropout_rate=0.0)
    return model, attach(model, CONFIG, tasks=TASKS, seed=3)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": PER_STEP,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": RATES["learning_rate"],
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def make_trainer(is_causal: bool, folder: Path, kind: Any = RoutedTrainer, **changes: Any) -> Any:
    model, adapter = attached(is_causal)
    return kind(
        model,
        arguments(folder, **changes),
        adapter=adapter,
        routing_lr=RATES["routing_lr"],
        train_dataset=make_rows(is_causal),
        data_collator=Padder(),
    )


def own_loop(is_causal: bool) -> tuple[Any, list[float]]:
    """The same in a loop of one's own: one clipping, a linear decay.

    A causal model's loss is over all targets of a step; an encoder-decoder's own one in
    transformers is the mean of its batches' means.
    """
    model, adapter = attached(is_causal)
    model.train()
    rows, collate = make_rows(is_causal), Padder()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(adapter.inventory.parameters()), "weight_decay": 0.1},
            {"params": [adapter.routing_logits], "lr": RATES["routing_lr"], "weight_decay": 0.0},
        ],
        lr=RATES["learning_rate"],
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = []
    for step in range(STEPS):
        begin = step * PER_STEP * ACCUMULATION
        total, batches = 0.0, []
        for part in range(ACCUMULATION):
            first = begin + part * PER_STEP
            batches.append([rows[n] for n in range(first, first + PER_STEP)])
        rows_of_step = [row for batch in batches for row in batch]
        count = sum(label != IGNORE for row in rows_of_step for label in row["labels"])
        for batch in batches:
            tensors = collate(batch)
            labels = tensors.pop("labels")
            if not is_causal:
                count = ACCUMULATION * labels.ne(IGNORE).sum().item()
            with adapter.slots([row["task"] for row in batch]) as slots:
                if is_causal:
                    logits = model(**tensors).logits[:, :-1]
                    labels = labels[:, 1:]
                else:
                    logits = model(**tensors, labels=labels).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE
                )
                slots.backward(loss / count)
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return adapter, losses


def difference(one: Any, other: Any) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "encoder-decoder"])
def test_twenty_steps_are_those_of_an_own_loop(is_causal: bool, tmp_path: Path) -> None:
    trainer = make_trainer(is_causal, tmp_path)
    begun = [parameter.detach().clone() for parameter in trainer.adapter.parameters()]
    names = set(trainer.model.state_dict())
    if not is_causal:  # its loss takes no count of targets; the Trainer believes it does
        trainer.loss_is_scaled_for_ga = False
    trainer.train()
    adapter, losses = own_loop(is_causal)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert torch.tensor(logged).sub(torch.tensor(losses)).abs().max() < 2e-6 * max(losses)
    assert difference(trainer.adapter, adapter) < 2e-5
    moved = zip(trainer.adapter.parameters(), begun, strict=True)
    assert all((own - first).abs().max() > 1e-2 for own, first in moved)
    assert set(trainer.model.state_dict()) == names


def test_a_resumed_run_is_an_uninterrupted_one_and_its_checkpoints_are_adapters(
    tmp_path: Path,
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(True, tmp_path / "whole", **saving)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    assert not list(folder.glob("model*"))
    again = make_trainer(True, tmp_path / "again", **saving)
    again.train(resume_from_checkpoint=str(folder))
    assert difference(again.adapter, whole.adapter) == 0.0
    kept = load_adapter(tmp_path / "again" / "checkpoint-6", model=small_causal("llama"))
    assert difference(kept, whole.adapter) == 0.0
    other = attach(small_causal("llama"), CONFIG, tasks=("copy", "sort", "other"))
    again.adapter.task_names = other.task_names
    with pytest.raises(AdapterError, match="another adapter than the one that is trained"):
        again.train(resume_from_checkpoint=str(folder))


def test_rows_are_evaluated_under_their_own_task(tmp_path: Path) -> None:
    """Also behind another Trainer, and with the best checkpoint at the end."""

    class Other(Trainer):
        pass

    class Mine(Routed, Other):
        pass

    model, adapter = attached(False)
    rows = make_rows(False)
    trainer = Mine(
        model,
        arguments(tmp_path, max_steps=2, per_device_eval_batch_size=4, logging_strategy="no"),
        adapter=adapter,
        train_dataset=rows.select(range(12)),
        eval_dataset=rows.select(range(8)),
        data_collator=Padder(),
    )
    trainer.train()
    sums = []
    model.eval()
    for first in (0, 4):
        batch = [rows[n] for n in range(first, first + 4)]
        with torch.no_grad(), adapter.slots([row["task"] for row in batch]):
            sums.append(model(**Padder()(batch)).loss.item())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(sums) / 2, rel=1e-5)


def refusal(tmp_path: Path, rows: Any, adapter: Any = None, **options: Any) -> str:
    model, own = attached(False)

    def train() -> None:
        RoutedTrainer(
            model,
            arguments(tmp_path, max_steps=1),
            adapter=adapter or own,
            train_dataset=rows,
            data_collator=Padder(),
            **options,
        ).train()

    with pytest.raises((AdapterError, DataError)) as caught:
        train()
    return str(caught.value)


def test_what_cannot_be_trained_is_one_line_with_a_way_out(tmp_path: Path) -> None:
    rows = make_rows(False)
    text = refusal(tmp_path, rows, task_column="tasks")
    assert "no column 'tasks'" in text
    assert "did you mean 'task'?" in text
    unknown = rows.map(lambda row, n: {"task": "cont" if n == 2 else "copy"}, with_indices=True)
    assert "has task 'cont', not in the adapter; did you mean 'count'?" in refusal(
        tmp_path, unknown
    )
    assert "task '3', not in the adapter" in refusal(tmp_path, [{**rows[0], "task": 3}])
    missing = rows.map(lambda row, n: {"task": None if n == 2 else "copy"}, with_indices=True)
    assert "a row has no task" in refusal(tmp_path, missing)
    bare = [{name: row[name] for name in row if name != "task"} for row in rows]
    assert "column 'task': a row has no task" in refusal(tmp_path, bare)
    _, other = attached(True)
    assert "attached to another model" in refusal(tmp_path, rows, adapter=other)


def test_a_collator_of_transformers_pads_the_rest(tmp_path: Path) -> None:
    model, adapter = attached(False)
    trainer = RoutedTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        adapter=adapter,
        train_dataset=make_rows(False),
        data_collator=DataCollatorForSeq2Seq(ByT5Tokenizer(), padding=True),
    )
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_it_too(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed; it is no dependency")

    class Mine(Routed, trl.SFTTrainer):
        pass

    model = small_causal("llama", vocab_size=384)
    adapter = attach(model, CONFIG, tasks=TASKS)
    rows = [
        {"prompt": f"say {n}", "completion": f" {n} and {n}", "task": TASKS[n % 3]}
        for n in range(8)
    ]
    settings = arguments(tmp_path, max_steps=2).to_dict() | {"bf16": False, "report_to": "none"}
    known = {field.name for field in fields(trl.SFTConfig)}
    trainer = Mine(
        model,
        trl.SFTConfig(**{name: value for name, value in settings.items() if name in known}),
        adapter=adapter,
        train_dataset=Dataset.from_list(rows),
        processing_class=ByT5Tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert next(iter(adapter.inventory.parameters())).isfinite().all()
    assert adapter.inventory.stacked(adapter.inventory.stacks[0], "B").abs().max() > 0
