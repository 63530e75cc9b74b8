"""What an answer is worth, from 0 to 100: Rouge-L and exact match of texts, accuracy of ranks.

Every function scores one example. The score of several is `score_of`: their mean, but for metrics
that only all answers of a task have (`crossfit.metrics`).
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from mhr_scale.run.runlog import log
from mhr_scale.tasks.crossfit import metrics as crossfit
from mhr_scale.tasks.loaded_metrics import PREFIX, MetricOptions, TextMetric, open_metric

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COUNTED = re.compile("[a-z0-9]")


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of stemmed words, best of the references."""
    for reference in references:
        if not _COUNTED.search(reference.lower()):
            _warn_of_uncounted(reference)
    scorer = _scorer()
    return 100.0 * max(scorer.score(text, prediction)["rougeL"].fmeasure for text in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Equality but for case, ASCII punctuation and spaces, with any of the references."""
    return 100.0 * (_plain(prediction) in {_plain(text) for text in references})


def accuracy(scores: Sequence[float], choices: Sequence[str], label: int) -> float:
    """Whether the text of the smallest score is that of the choice at `label`."""
    return 100.0 * (choices[best_choice(scores)] == choices[label])


def best_choice(scores: Sequence[float]) -> int:
    """Index of the smallest score; of equal ones the first."""
    return min(range(len(scores)), key=scores.__getitem__)


#: Metrics of generated texts: prediction and references to points.
TEXT_METRICS: dict[str, TextMetric] = {
    "exact_match": exact_match,
    "rougeL": rouge_l,
    **crossfit.TEXT_METRICS,
}
#: Metrics of ranked choices: scores (the smallest wins), the choices and label to points.
RANK_METRICS: dict[str, Callable[[Sequence[float], Sequence[str], int], float]] = {
    "accuracy": accuracy
}
METRICS: dict[str, Callable[..., float]] = {**RANK_METRICS, **TEXT_METRICS}


def text_metric(name: str, options: MetricOptions | None = None) -> TextMetric:
    """A metric of generated texts by its name; raises `DataError` for one that cannot be loaded."""
    return open_metric(name, options) if name.startswith(PREFIX) else TEXT_METRICS[name]


def score_of(lines: Sequence[Mapping[str, Any]]) -> float:
    """The score of one or more lines of scores.jsonl, which have one metric."""
    whole = crossfit.WHOLE_METRICS.get(lines[0]["metric"])
    if whole is None:
        return sum(float(line["points"]) for line in lines) / len(lines)
    return whole([line["prediction"] for line in lines], [line["references"] for line in lines])


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


@cache
def _scorer() -> Any:
    """The scorer, imported and built at its first use."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


_warned: list[str] = []


def _warn_of_uncounted(reference: str) -> None:
    """Say once that Rouge-L sees nothing in such texts."""
    if not _warned:
        _warned.append(reference)
        log.warning(
            "rougeL counts a-z and 0-9 only: references such as %r score 0 whatever the answer; "
            "use exact_match for such tasks",
            reference[:80],
        )
