"""lm-evaluation-harness's model `mhr_scale`: its requests on our ranking and generation.

What is asked, cut, closed and counted is the harness's own, by its Hugging Face model, which this
one is a kind of. Requests behind one prompt are branches of one row, what prompts begin with alike
is computed once, batches are filled by tokens, and each task's requests run under the ordinary
adapter of its task.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from tqdm import tqdm

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.collapse import average, collapse
from mhr_scale.backbone.of_adapter import backbone_of, check_fit, open_adapter
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import open_backbone, place
from mhr_scale.errors import AdapterError, ConfigError, EngineError, suggest
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes.scoring import generate_ids, judge_choices
from mhr_scale.recipe import typed
from mhr_scale.recipe.strict_yaml import read_file
from mhr_scale.rows.batching import Batch, cut_batches
from mhr_scale.run.runlog import world_size

#: What a task may be called that stands for the mean of the skills.
AVERAGE = "average"
#: The harness's task in a map that stands for all others.
OTHERS = "*"
#: How long a rank would wait for others; there are none.
SECONDS = 600.0


@register_model("mhr_scale")
class RoutedLM(HFLM):
    """A backbone and an adapter, whose task may be another one for each task of the harness."""

    def __init__(
        self,
        adapter: str | None = None,
        backbone: str | None = None,
        *,
        task: str | None = None,
        map: str | Mapping[str, str] | None = None,
        dtype: str | None = None,
        quantise: str | None = None,
        device: str | None = None,
        max_tokens: int = 4096,
        packing: bool | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        """Open the backbone, and the adapter if there is one, on one device.

        `adapter` is whatever `evaluate` takes; its `backbone` need not be said unless it has moved.
        The adapter's task is `task` for all, or by `map` (a YAML file, or a mapping): of each task
        of the harness, `*` of all others; `average` (the default) is the mean of the skills.
        `max_tokens` fill a batch; `batch_size` and `max_batch_size`, which the harness gives every
        model, are not read. Raises `ConfigError`, `AdapterError` or `BackboneError`.
        """
        if unknown:
            name = next(iter(unknown))
            known = [key for key in RoutedLM.__init__.__annotations__ if key != "unknown"]
            raise ConfigError(f"model_args: no setting '{name}'{suggest(name, known)}")
        if world_size() > 1:
            raise EngineError("model mhr_scale runs in one process; start it without a launcher")
        config, card, self.whole = _open(adapter, backbone, dtype, quantise)
        self.tasks = _read_tasks(task, map, self.whole)
        opened = open_backbone(
            config, ds_config=None, timeout_seconds=SECONDS, recipe=config, adapter=adapter
        )
        if adapter is not None and card is not None:
            check_fit(adapter, card, opened.blueprint)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        engine = Engine({}, timeout_seconds=SECONDS, device=where)
        sites = () if card is None else card.sites
        self.placed = place(engine, config, opened.blueprint, sites)
        self._singles: dict[str, Adapter] = {}
        self._single: Adapter | None = None
        self._max_tokens, self._max_gen_toks = max_tokens, max_gen_toks
        self._is_flat = self.placed.lays_flat(packing, "packing")
        model = self.placed.model
        model.tie_weights = lambda *_, **__: None  # ties are those that the weights have
        super().__init__(
            model,
            tokenizer=opened.tokenizer,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            chat_template_args=chat_template_args,
            batch_size=2**31,  # rolling windows come at once
        )
        self._device = where
        self.pretrained, self.revision = str(config.name), config.revision or "main"

    @property
    def max_gen_toks(self) -> int:
        """How many tokens a task that does not say may have written."""
        return self._max_gen_toks

    # -- which adapter -----------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether greedy decoding writes them."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to one of their ends."""
        return self._by_task(self._generate, requests, disable_tqdm)

    def _by_task(
        self, answer: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool
    ) -> list[Any]:
        """Answers to the requests of each task of the adapter in turn, in the requests' order."""
        places: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            places.setdefault(self._task_of(request.task_name), []).append(number)
        found: list[Any] = [None] * len(requests)
        for task, numbers in places.items():
            self._use(task)
            values = answer([requests[n] for n in numbers], disable_tqdm=disable_tqdm)
            for number, value in zip(numbers, values, strict=True):
                found[number] = value
        return found

    def _task_of(self, name: str | None) -> str:
        """The adapter's task for a task of the harness."""
        known = self.tasks
        if name not in known and OTHERS not in known:
            hint = suggest(str(name), known)
            raise ConfigError(
                f"map: the harness's task '{name}' is not in it{hint}; name it, or '*' for others"
            )
        return known.get(str(name), known.get(OTHERS, AVERAGE))

    def _use(self, task: str) -> None:
        """Put a task's adapter into the model."""
        if self.whole is None:
            return
        if task not in self._singles:
            config = self.whole.config
            is_own = task != AVERAGE and (config.has_logits or config.private)
            self._singles[task] = collapse(self.whole, task) if is_own else average(self.whole)
        self._single = self._singles[task]
        self._single.bind(self.placed.adapted)

    # -- ranking -----------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        places: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            prompt, answer = self._cut(context, continuation)
            places.setdefault(prompt, {}).setdefault(answer, []).append(number)
        rows = [
            EncodedRow(np.array(prompt), tuple(map(np.array, answers)), number=number)
            for number, (prompt, answers) in enumerate(places.items())
        ]
        numbers = [list(answers.values()) for answers in places.values()]
        is_shared = self._is_flat and self.placed.family.shares_prompts
        layout = {"is_flat": self._is_flat, "is_shared": is_shared}
        found: list[Any] = [None] * len(requests)
        for batch in self._batches(rows, "loglikelihood", disable_tqdm, **layout):
            judged = judge_choices(self.placed, self._single, batch, **layout)
            for row, values in zip(batch, judged, strict=True):
                for value, those in zip(values, numbers[row.number], strict=True):
                    for number in those:
                        found[number] = value
        for (texts, _, _), value in zip(requests, found, strict=True):
            if texts is not None:  # a window of a whole text has none
                self.cache_hook.add_partial("loglikelihood", texts, value)
        return found

    def _cut(
        self, context: list[int], continuation: list[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids as the harness cuts them: on the left, so that the model can read them."""
        most = self.max_length
        if self.backend == "causal":
            context = (context + continuation)[-(most + 1) :][: -len(continuation)]
            return tuple(context), tuple(continuation)
        return tuple(context[-most:]), tuple(continuation[-most:])

    def _batches(
        self, rows: list[EncodedRow], what: str, disable_tqdm: bool, **layout: bool
    ) -> Iterator[Batch]:
        bar = tqdm(total=len(rows), desc=f"Running {what} requests", disable=disable_tqdm)
        with bar:
            for batch in cut_batches(rows, max_tokens=self._max_tokens, **layout):
                yield batch
                bar.update(len(batch))

    # -- generation --------------------------------------------------------------------------

    def _generate(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found = [""] * len(requests)
        ending = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for numbers in groups.values():
            options: dict[str, Any] = dict(
                normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            )
            until = handle_stop_sequences(options.pop("until"), eos=ending)
            n_new = options.pop("max_gen_toks")
            if "max_length" in options:
                raise ConfigError("generation_kwargs: max_length; say max_gen_toks instead")
            if not options["do_sample"]:
                options.pop("temperature", None)
            room = self.max_length - (n_new if self.backend == "causal" else 0)
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks: {n_new} is all that the backbone can read ({self.max_length})"
                )
            rows = [EncodedRow(self._prompt(requests[n].args[0], room), number=n) for n in numbers]
            options |= {"max_new_tokens": n_new}
            for batch in self._batches(rows, "generate_until", disable_tqdm):
                if options.get("num_beams", 1) == 1:  # beams change places
                    options["stopping_criteria"] = [_Endings(self.tokenizer, until)]
                ids = generate_ids(self.placed, self._single, batch, **options)
                for row, written in zip(batch, ids, strict=True):
                    text = postprocess_generated_text(self.tok_decode(written), until, None)
                    found[row.number] = text
                    self.cache_hook.add_partial("generate_until", requests[row.number].args, text)
        return found

    def _prompt(self, text: str, room: int) -> Any:
        ids, _ = self.tok_batch_encode([text], left_truncate_len=room)
        return ids[0].numpy()


class _Endings:
    """Tells of each row whether one of the texts that end it has been written.

    The rest of a row is cut from its text in the end; this saves the passes.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._until = [text for text in until if text]
        # no token of the text is shorter than a byte; two more, as tokens may join it
        self._n_back = max((len(text.encode()) for text in self._until), default=0) + 2
        self._begin: int | None = None

    def __call__(self, ids_BL: Tensor, scores: Any, **options: Any) -> Tensor:
        """Whether each row is done; called after each new token."""
        if self._begin is None:
            self._begin = ids_BL.shape[1] - 1
            self._done_B = torch.zeros(len(ids_BL), dtype=torch.bool)
        tail_BL = ids_BL[:, self._begin :][:, -self._n_back :]
        texts = self._tokenizer.batch_decode(tail_BL.tolist())
        ended = [any(stop in text for stop in self._until) for text in texts]
        self._done_B |= torch.tensor(ended)
        return self._done_B.to(ids_BL.device)


def _open(
    adapter: str | None, backbone: str | None, dtype: str | None, quantise: str | None
) -> tuple[BackboneConfig, Card | None, Adapter | None]:
    """The backbone's settings, and the adapter's card and tensors if there is one."""
    if adapter is not None:
        card, whole = open_adapter(adapter, backbone)
        found = backbone_of(adapter, card, backbone, dtype=dtype, quantise=quantise)
        return found, card, whole
    if backbone is None:
        raise ConfigError("model_args: give an adapter, a backbone, or both")
    settings = {"name": backbone, "dtype": dtype, "quantise": quantise}
    given = {name: value for name, value in settings.items() if value is not None}
    return typed.build(BackboneConfig, given, name="model_args"), None, None


def _read_tasks(
    task: str | None, given: str | Mapping[str, str] | None, adapter: Adapter | None
) -> dict[str, str]:
    """The adapter's task by task of the harness; raises for tasks that the adapter lacks."""
    if adapter is None:
        if task is not None or given is not None:
            raise ConfigError("model_args: a task or map without an adapter; leave it out")
        return {OTHERS: AVERAGE}
    if given is None:
        tasks = {OTHERS: AVERAGE if task is None else task}
    elif task is not None:
        raise ConfigError("model_args: task and map; give one of them ('*' in a map is all others)")
    else:
        tasks = _read_map(given)
    for name, own in tasks.items():
        if not isinstance(own, str):
            raise ConfigError(f"map: {name}: {own!r} is no name of a task")
        if own != AVERAGE:
            try:
                adapter.check_task_ids([own])
            except AdapterError as error:
                raise AdapterError(f"{name if given else 'model_args'}: {error}") from error
    return tasks


def _read_map(given: str | Mapping[str, str]) -> dict[str, Any]:
    """Tasks of the adapter by tasks of the harness."""
    if isinstance(given, Mapping):
        return dict(given)
    return read_file(Path(given), error=ConfigError)[0]
