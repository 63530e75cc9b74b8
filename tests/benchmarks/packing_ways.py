"""What `packing.py` compares: ways to train on the same rows of a real mixture, a step at a time.

A global batch has the same rows in every way but the one that groups rows by length. All ways have
the same frozen weights, and a step of each begins with token ids: it cuts micro batches, pads or
packs them, runs them, clips and updates.
"""

import copy
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from step_time_ways import SWITCHES, same_weights
from torch import Tensor, nn
from torch.utils.data import Dataset

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.sites import Site
from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.of_adapter import find_sites_of
from mhr_scale.config import PretrainConfig
from mhr_scale.engine.opened import OpenedBackbone, PlacedBackbone, open_backbone
from mhr_scale.families.packed import IGNORE, EncodedRow
from mhr_scale.passes import validation
from mhr_scale.rows.batching import StepBatches, draw_rows
from mhr_scale.rows.tokens import TokenSet, open_tokens
from mhr_scale.training.opening import make_batches, make_plan
from mhr_scale.training.optim import has_row_gradients
from mhr_scale.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Done:
    """A step: useful tokens (of inputs and targets), and what of the positions was padding."""

    tokens: int
    padding_share: float
    loss: float | None = None


class Way(Protocol):
    """A way to train."""

    name: str
    micro: int

    def ready(self) -> Any:
        """The block around a step; what it does is not timed."""

    def step(self) -> Done:
        """The next step."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A mixture of rows, and a placed backbone."""

    config: PretrainConfig
    opened: OpenedBackbone
    placed: PlacedBackbone
    tokens: TokenSet
    sites: tuple[Site, ...]

    @classmethod
    @contextmanager
    def open(cls, config: PretrainConfig) -> Iterator["Bench"]:
        """Read the rows and place the backbone of a recipe."""
        opened = open_backbone(config.backbone, ds_config=None, timeout_seconds=600, recipe=config)
        sites = find_sites_of(opened.blueprint, config.adapter)
        tokens = open_tokens(
            config.tasks, opened.tokenizer, config.batch, opened.family, cache=None
        )
        with opened.placed(sites) as placed:
            yield cls(config, opened, placed, tokens, sites)

    def with_micro(self, size: int, *, packing: bool) -> PretrainConfig:
        """The recipe with micro batches of so many rows."""
        batch = replace(self.config.batch, micro_batch_size=size, packing=packing)
        return replace(self.config, batch=batch)

    def batches(self, config: PretrainConfig) -> StepBatches:
        """The micro batches of any step."""
        return make_batches(config, self.placed, self.tokens, make_plan(config, self.tokens))

    def rows(self, n_steps: int) -> list[EncodedRow]:
        """The rows of the first steps, in the order of the mixture."""
        samples = make_plan(self.config, self.tokens).samples(
            0, n_steps * self.config.batch.batch_size
        )
        references = self.config.tasks.target_choice()
        return draw_rows(samples, self.tokens.train, references=references, seed=0)

    def stock_model(self) -> Any:
        """The same weights in transformers' own modules."""
        parts = {f"fused_{name}": False for name in SWITCHES}
        stock = replace(self.opened.config, **parts)
        # read anew: placing a backbone changes its configuration's attention
        model = self.placed.engine.build(stock, read_blueprint(stock))
        return model.requires_grad_(False)


# -- ours ------------------------------------------------------------------------------------------


class Ours:
    """The step of `pretrain`."""

    def __init__(self, bench: Bench, micro: int, *, packing: bool) -> None:
        self.name, self.micro = f"MHR, {'packed' if packing else 'buckets'}", micro
        config = bench.with_micro(micro, packing=packing)
        self.placed = bench.placed
        adapter = Adapter(
            config.adapter,
            bench.sites,
            task_names=[card.name for card in bench.tokens.cards],
            seed=config.run.seed,
            row_gradients=has_row_gradients(config.optim),
        )
        self.trainer = Trainer(
            config,
            placed=bench.placed,
            adapter=adapter,
            tokens=bench.tokens,
            batches=bench.batches(config),
            backbone_facts={},
        )

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Its adapter on the shared backbone."""
        self.trainer.adapter.bind(self.placed.adapted)
        yield

    def step(self) -> Done:
        """Fetch, forward and backward, clip, update."""
        trainer = self.trainer
        values = trainer._train_step(trainer.batches[trainer.step], time.monotonic())
        return Done(int(values["tokens"]), values["padding_share"], values["loss"])

    def close(self) -> None:
        """Nothing."""


class Frozen:
    """The frozen backbone alone: gradients pass through it to the embedded tokens."""

    def __init__(self, bench: Bench, micro: int, *, packing: bool) -> None:
        self.name, self.micro = f"frozen, {'packed' if packing else 'buckets'}", micro
        self.placed, self.number = bench.placed, 0
        self.batches = bench.batches(bench.with_micro(micro, packing=packing))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """No adapter, and embedded tokens that want a gradient."""

        def flow(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        model = self.placed.model.train()
        with ExitStack() as stack:
            for embedding in dict.fromkeys(self.placed.family.embeddings(model)):
                stack.callback(embedding.register_forward_hook(flow).remove)
            stack.enter_context(adapters_off(model))
            yield

    def step(self) -> Done:
        """The passes of a step."""
        total, count, tokens, positions, padding = 0.0, 0, 0, 0, 0
        for packed in self.batches[self.number]:
            with packed.in_use():
                loss = validation.forward(self.placed, packed).sum.sum()
                loss.backward()
            total += loss.item()
            count += packed.n_target_tokens
            tokens += packed.n_input_tokens + packed.n_target_tokens
            positions += packed.n_positions
            padding += packed.n_padding
        self.number += 1
        return Done(tokens, padding / positions, total / count)

    def close(self) -> None:
        """Nothing."""


# -- the Hugging Face Trainer ----------------------------------------------------------------------


class Rows(Dataset[dict[str, list[int]]]):
    """Rows as the library's collator pads them; of a causal model labels are -100 in the prompt."""

    def __init__(self, rows: Sequence[EncodedRow], *, is_causal: bool) -> None:
        self.rows, self.is_causal = rows, is_causal

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        inputs, labels = row.input_ids.tolist(), row.answers[0].tolist()
        if self.is_causal:
            inputs, labels = inputs + labels, [IGNORE] * len(inputs) + labels
        return {
            "input_ids": inputs,
            "attention_mask": np.ones_like(inputs).tolist(),
            "labels": labels,
        }


class WithTrainer:
    """Stock PEFT LoRA under the Hugging Face Trainer with its own collator, padding and optimizer.

    The Trainer runs in a thread of its own that waits between two steps. A step is from the end of
    the step before to its own end; the first one has the start of training in it.
    """

    def __init__(
        self, bench: Bench, stock: Any, micro: int, *, n_steps: int, rank: int, by_length: bool
    ) -> None:
        self.name = "PEFT, Trainer" + (", by length" if by_length else "")
        self.micro = micro
        self._is_by_length, self._is_t5 = by_length, bool(stock.config.is_encoder_decoder)
        self._go, self._end = threading.Semaphore(0), threading.Semaphore(0)
        self._is_closing, self._error = False, None
        self._tokens = self._positions = 0
        self._output = tempfile.TemporaryDirectory()
        self._trainer = self._make_trainer(bench, stock, n_steps, rank, by_length=by_length)
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def _make_trainer(
        self, bench: Bench, stock: Any, n_steps: int, rank: int, *, by_length: bool
    ) -> Any:
        import transformers
        from peft import LoraConfig, get_peft_model

        config, family, way = bench.config, bench.placed.family, self
        is_causal = not self._is_t5
        lora = LoraConfig(
            task_type=family.peft_task_type,
            r=rank,
            target_modules=sorted({site.name.rpartition(".")[2] for site in bench.sites}),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(same_weights(stock), lora)
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        tokenizer = copy.deepcopy(bench.opened.tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        collator = transformers.DataCollatorForSeq2Seq(
            tokenizer, model=None if is_causal else model
        )
        names = {"adafactor": "adafactor", "adamw": "adamw_torch"}
        args = transformers.TrainingArguments(
            output_dir=self._output.name,
            per_device_train_batch_size=self.micro,
            gradient_accumulation_steps=config.batch.batch_size // self.micro,
            max_steps=n_steps,
            learning_rate=config.optim.lr,
            optim=names[config.optim.name],
            max_grad_norm=config.optim.clip_norm or 0.0,
            # the rows of a step are those of the other ways; they come shuffled from the mixture
            train_sampling_strategy="group_by_length" if by_length else "sequential",
            label_names=["labels"],
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=bench.placed.device.type == "cpu",
        )

        class Pauses(transformers.TrainerCallback):  # type: ignore[misc]
            """Waits for the next turn behind each step."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                way._end.release()
                way._go.acquire()
                if way._is_closing:
                    control.should_training_stop = True
                return control

        rows = Rows(bench.rows(n_steps), is_causal=is_causal)
        trainer = transformers.Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[Pauses()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def _note(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask, labels = kwargs["attention_mask"], kwargs["labels"]
        self._tokens += int(mask.sum())
        self._positions += mask.numel()
        if self._is_t5:
            self._tokens += int((labels != IGNORE).sum())
            self._positions += labels.numel()

    def _run(self) -> None:
        try:
            self._go.acquire()
            if not self._is_closing:
                self._trainer.train()
        except BaseException as error:
            self._error = error
        finally:
            self._end.release()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Its thread."""
        if not self._thread.ident:
            self._thread.start()
        yield

    def step(self) -> Done:
        """Let the Trainer go on to the end of its next step."""
        self._tokens = self._positions = 0
        self._go.release()
        self._end.acquire()
        if self._error is not None:
            raise self._error
        return Done(self._tokens, 1.0 - self._tokens / self._positions)

    @property
    def first_loss(self) -> float | None:
        """The loss of the first step, which the Trainer logs once it is over; None: other rows.

        T5 gives means of micro batches, and the Trainer adds these up where PEFT is in between.
        """
        if self._is_by_length:
            return None
        n_added = self._trainer.args.gradient_accumulation_steps if self._is_t5 else 1
        return float(self._trainer.state.log_history[0]["loss"]) / n_added

    def close(self) -> None:
        """Stop the Trainer."""
        self._is_closing = True
        self._go.release()
        if self._thread.ident:
            self._thread.join()
        self._output.cleanup()
