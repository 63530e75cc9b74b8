"""CrossFit's seven metrics of generated texts, in points.

Of one answer, 0 to 100, the best of the accepted ones counting:

    squad_em      EM: equal in lower case, without ASCII punctuation, without the words a, an and
                  the, white space folded
    same_text     ACC: equal in lower case
    squad_f1      QA-F1: F1 of the words, counted, after what squad_em does
    rouge_words   Rouge-L: F of the `rouge` package 1.0.1, defined below

Of all answers of a task together, which is no mean over them; the first reference is the right one:

    macro_f1      Classification-F1: the mean, over all texts that are an answer or a reference, of
                  the F1 of saying that text (0 where one is never said or never right)
    matthews      Matthew-Correlation: of "acceptable" against all other texts; -100 to 100
    pearson       Pearson-Correlation of the texts read as numbers; -100 to 100

Both correlations are 0 where one side does not vary. An answer that is no number
counts as the mean of the answers that are: it agrees with nothing, and lowers the size of the
correlation. (The reference reads it as NaN, and then has no score for the task.)

White space around texts never counts. What a single answer is worth under the last three (the
points of its line) is whether it is the first reference; the score of the task does not come from
it.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

#: A metric of all answers of a task: answers and their references to points.
WholeMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
#: The text that Matthews' correlation tells from all others.
ACCEPTABLE = "acceptable"
#: Keeps the `rouge` package from dividing by 0.
TINY = 1e-8
#: What a text says at most to be a number: sums of its squares stay finite.
LARGEST = 1e100


def squad_em(prediction: str, references: Sequence[str]) -> float:
    """Equality but for case, punctuation, articles and white space, with any of the references."""
    return 100.0 * (_plain(prediction) in {_plain(text) for text in references})


def same_text(prediction: str, references: Sequence[str]) -> float:
    """Equality but for case with any of the references."""
    return 100.0 * (prediction.strip().lower() in {text.strip().lower() for text in references})


def squad_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the answer's words, the best of the references; 0 where they share none."""
    return 100.0 * max(_word_f1(_plain(prediction), _plain(text)) for text in references)


def rouge_words(prediction: str, references: Sequence[str]) -> float:
    """F of the longest common subsequences of sentences, the best of the references.

    Sentences end at full stops, words at white space. Over all pairs of sentences, the words of a
    longest common subsequence are gathered; precision and recall are the share of different words
    of either text that are among them. Punctuation alone scores 0.
    """
    if not prediction.strip().translate(_NO_PUNCTUATION):
        return 0.0
    said = _sentences(prediction.strip())
    return 100.0 * max(_rouge(said, _sentences(text.strip())) for text in references)


def is_first(prediction: str, references: Sequence[str]) -> float:
    """Whether an answer is the first reference, letter for letter."""
    return 100.0 * (prediction.strip() == references[0].strip())


def macro_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 over every text that is said or right."""
    said = [text.strip() for text in predictions]
    right = [texts[0].strip() for texts in references]
    hits = Counter(text for text, other in zip(said, right, strict=True) if text == other)
    counts = Counter(said) + Counter(right)
    return 100.0 * sum(2 * hits[text] / count for text, count in counts.items()) / len(counts)


def matthews(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Correlation of "acceptable" against all else."""
    said = [float(text.strip() == ACCEPTABLE) for text in predictions]
    return _correlation(said, [float(texts[0].strip() == ACCEPTABLE) for texts in references])


def pearson(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Correlation of the numbers that texts are; raises `ValueError` if a reference is none."""
    said = [number(text) for text in predictions]
    found = [value for value in said if value is not None]
    mean = sum(found) / len(found) if found else 0.0
    right = [float(texts[0]) for texts in references]
    return _correlation([mean if value is None else value for value in said], right)


def number(text: str) -> float | None:
    """The number that a text is, if it is one of at most 100 digits."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None


def is_mean(metric: str) -> bool:
    """Whether the score of several answers is the mean of what each is worth."""
    return metric not in WHOLE_METRICS


def reference_problem(metric: str, references: Sequence[str]) -> str | None:
    """Why a metric cannot use a row's references, if it cannot."""
    if metric == "pearson" and number(references[0]) is None:
        return f"{references[0].strip()!a} is no number, and {metric} correlates numbers"
    return None


TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "squad_em": squad_em,
    "same_text": same_text,
    "squad_f1": squad_f1,
    "rouge_words": rouge_words,
    "macro_f1": is_first,
    "matthews": is_first,
    "pearson": is_first,
}
#: Those whose score of a task is no mean over its answers.
WHOLE_METRICS: dict[str, WholeMetric] = {
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
}
#: CrossFit's names of them.
OURS = {
    "EM": "squad_em",
    "ACC": "same_text",
    "QA-F1": "squad_f1",
    "Classification-F1": "macro_f1",
    "Matthew-Correlation": "matthews",
    "Pearson-Correlation": "pearson",
    "Rouge-L": "rouge_words",
}


def _plain(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _word_f1(said: str, right: str) -> float:
    words, others = said.split(), right.split()
    n_same = (Counter(words) & Counter(others)).total()
    return 2 * n_same / (len(words) + len(others)) if n_same else 0.0


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's correlation in points; 0 where a side does not vary."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return 0.0
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    dx, dy = [x - mean_x for x in xs], [y - mean_y for y in ys]
    size = math.hypot(*dx) * math.hypot(*dy)
    both = math.fsum(x * y for x, y in zip(dx, dy, strict=True))
    return 100.0 * max(-1.0, min(1.0, both / size)) if size > 0.0 else 0.0


def _sentences(text: str) -> list[list[str]]:
    """The words of every sentence; one of white space alone has one word, which is empty."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _rouge(said: list[list[str]], right: list[list[str]]) -> float:
    n_said = len({word for sentence in said for word in sentence})
    n_right = len({word for sentence in right for word in sentence})
    if not n_said or not n_right:
        return 0.0
    shared = {word for a in right for b in said for word in _common(a, b)}
    precision, recall = len(shared) / n_said, len(shared) / n_right
    return 2.0 * precision * recall / (precision + recall + TINY)


def _common(xs: list[str], ys: list[str]) -> list[str]:
    """The words of the longest common subsequence that is found from the end, `ys` first."""
    lengths = [[0] * (len(ys) + 1) for _ in range(len(xs) + 1)]
    for i, x in enumerate(xs, start=1):
        above, row = lengths[i - 1], lengths[i]
        for j, y in enumerate(ys, start=1):
            row[j] = above[j - 1] + 1 if x == y else max(above[j], row[j - 1])
    words, i, j = [], len(xs), len(ys)
    while i and j:
        if xs[i - 1] == ys[j - 1]:
            words.append(xs[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
