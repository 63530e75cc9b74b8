"""Questions made from tasks, how a model answers them, and the lines of scores.jsonl.

A line has `points`, 0 to 100, the more the better. Where choices are ranked it has `choice_scores`
too, for which less is better: a choice's negative log-likelihood in nats, summed over its tokens
(end of sequence included) and divided by their number ** `scoring.length_norm`; `prediction` and
`label` are places among the choices, from 0. Where text is generated, `prediction` is that text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from mhr_scale.adapters import Adapter
from mhr_scale.config import ScoringConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import DataError
from mhr_scale.families.family import Family
from mhr_scale.families.packed import EncodedRow
from mhr_scale.passes.scoring import generate_answers, rank_choices
from mhr_scale.rows.batching import Batch, cut_batches
from mhr_scale.rows.encode import Encoder
from mhr_scale.run.runlog import log
from mhr_scale.tasks import metrics
from mhr_scale.tasks.crossfit.metrics import reference_problem
from mhr_scale.tasks.loaded_metrics import TextMetric
from mhr_scale.tasks.task import Example, Task


@dataclass(frozen=True, slots=True)
class Question:
    """One example to score: its global id, its task and its metric; `score` is that of a text."""

    id: str
    task: str
    metric: str
    example: Example
    score: TextMetric | None


#: Rows of a scores.jsonl from which on it holds no texts unless the recipe asks for them.
MANY_ROWS = 50_000


def keeps_texts(config: ScoringConfig, n_rows: int) -> bool:
    """Whether a scores.jsonl of so many rows holds the texts of inputs and choices."""
    return n_rows < MANY_ROWS if config.texts is None else config.texts


def judge(question: Question, value: Any, *, with_texts: bool = False) -> dict[str, Any]:
    """One line of scores.jsonl from the choice scores or the generated text of a question."""
    example = question.example
    line: dict[str, Any] = {
        "id": question.id,
        "task": question.task,
        "example": example.id,
        "prompt": example.prompt,
        "metric": question.metric,
    }
    line |= {"input": example.input} if with_texts else {}
    if question.score is None:
        label = example.label
        assert label is not None
        prediction = metrics.best_choice(value)
        line |= {"choices": list(example.choices)} if with_texts else {}
        line |= {"choice_scores": value, "prediction": prediction, "label": label}
        return {**line, "points": metrics.accuracy(value, example.choices, label)}
    points = question.score(value, example.targets)
    return {**line, "prediction": value, "references": list(example.targets), "points": points}


def ask(task: Task, config: ScoringConfig) -> list[Question]:
    """The questions of a task.

    Raises `DataError` if one lacks choices or a label to rank, or the metric cannot be loaded.
    """
    metric = config.metric or task.metric
    score = None if metric == "accuracy" else _score_of(task, metric)
    questions = []
    for example in task.test:
        if metric == "accuracy":
            if not example.choices:
                raise DataError(
                    f"task {task.name}: example {example.id} has no choices to rank; set "
                    "scoring.metric to rougeL or exact_match, or give choices"
                )
            if example.label is None or not 0 <= example.label < len(example.choices):
                raise DataError(
                    f"task {task.name}: example {example.id} has label {example.label} for "
                    f"{len(example.choices)} choices; hidden labels cannot be scored"
                )
        problem = reference_problem(metric, example.targets)
        if problem is not None:
            raise DataError(
                f"task {task.name}: example {example.id}: {problem}; give the task another metric"
            )
        questions.append(Question(f"{task.name}/{example.id}", task.name, metric, example, score))
    return questions


def _score_of(task: Task, metric: str) -> TextMetric:
    """The metric of a task's texts; raises `DataError` with its name if it cannot be loaded."""
    try:
        return metrics.text_metric(metric, task.metric_options)
    except DataError as error:
        raise DataError(f"task {task.name}: {error}") from error


def encode(
    tasks: Sequence[Task],
    questions: Sequence[Question],
    numbers: dict[str, int],
    tokenizer: Any,
    family: Family,
    config: ScoringConfig,
) -> list[EncodedRow]:
    """Token ids of the questions, in their order; answers only where choices are ranked."""
    rows: list[EncodedRow] = []
    for task in tasks:
        n_alike = 0
        encoder = Encoder(task, tokenizer, config.lengths, family)
        for input_ids in encoder.inputs(task.test):
            number = len(rows)
            is_ranked = questions[number].score is None
            choices = questions[number].example.choices if is_ranked else ()
            answers = encoder.answers(choices)
            n_alike += len({ids.tobytes() for ids in answers}) < len(set(choices))
            rows.append(EncodedRow(input_ids, answers, task=numbers[task.name], number=number))
        if encoder.cuts.inputs:
            log.info("task %s: %d inputs cut", task.name, encoder.cuts.inputs)
        if n_alike:
            log.warning(
                "task %s: %d rows have different choices of the same tokens, of which the first "
                "wins; scoring.max_choice_tokens cuts at %d",
                task.name,
                n_alike,
                config.max_choice_tokens,
            )
    return rows


#: The settings that cut the texts that `longest` counts.
LENGTHS = "scoring.max_input_tokens, max_choice_tokens and max_new_tokens"


def longest(rows: Sequence[EncodedRow], config: ScoringConfig) -> tuple[int, int]:
    """The longest row: tokens of its input, and of its longest choice or of what it may write."""
    lengths = (
        (len(row.input_ids), max(map(len, row.answers), default=config.max_new_tokens))
        for row in rows
    )
    return max(lengths, key=sum, default=(0, 0))


class Answerer(NamedTuple):
    """A way to answer: its name, its function of a batch, and its batches."""

    name: str
    run: Callable[[Batch], list[Any]]
    batches: list[Batch]


def answerers(
    rows: Sequence[EncodedRow],
    placed: PlacedBackbone,
    adapter: Adapter | None,
    tokenizer: Any,
    options: ScoringConfig,
) -> list[Answerer]:
    """The two ways to answer: `rank` rows with choices, `generate` for the others."""
    is_flat = placed.lays_flat(options.packing, "scoring.packing")
    norm = options.length_norm
    is_shared = is_flat and placed.family.shares_prompts
    rank = partial(
        rank_choices, placed, adapter, length_norm=norm, is_flat=is_flat, is_shared=is_shared
    )
    generate = partial(
        generate_answers,
        placed,
        adapter,
        tokenizer=tokenizer,
        beams=options.beams,
        max_new_tokens=options.max_new_tokens,
    )
    ranked = [row for row in rows if row.answers]
    others = [row for row in rows if not row.answers]
    most = options.max_tokens
    return [
        Answerer(
            "rank",
            rank,
            cut_batches(ranked, max_tokens=most, is_flat=is_flat, is_shared=is_shared),
        ),
        Answerer("generate", generate, cut_batches(others, max_tokens=most)),
    ]
