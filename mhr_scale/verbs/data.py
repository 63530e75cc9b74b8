"""The verb `data`: read and tokenise the tasks of a recipe, and print what they hold.

Below the table stand three rows in the words of their tokens: what is read, and what is trained.

With `run.token_cache` it fills the cache from which later runs of the recipe read their tokens.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import PretrainConfig
from mhr_scale.errors import DataError, one_line, printable
from mhr_scale.families.packed import Ids
from mhr_scale.rows.encode import SHOWN_ROWS
from mhr_scale.rows.tokens import TaskCard, TokenSet, open_tokens
from mhr_scale.run.runlog import rank
from mhr_scale.run.streams import write_result
from mhr_scale.run.tables import prose, render
from mhr_scale.tasks.task import Intake

SHOWN_REJECTS = 10
#: Stands where tokens of a row were cut.
CUT = " [... cut ...] "
HEADS = (
    *("task", "metric", "train", "held out", "mean in", "mean out"),
    *("cut in", "cut out", "dropped", "refused"),
)


def check_data(config: PretrainConfig) -> None:
    """Print counts, lengths, cuts and refused rows per task, and three rows in words.

    Raises `DataError` if a run of this recipe would refuse its data.
    """
    blueprint = read_blueprint(config.backbone)
    tokenizer = load_tokenizer(config.backbone, blueprint)
    tokens = open_tokens(
        config.tasks,
        tokenizer,
        config.batch,
        blueprint.family,
        cache=config.run.token_cache,
        on_bad="skip",
    )
    if rank() == 0:
        write_result(report(tokens) + show_rows(tokens, tokenizer))
    check_refused(tokens, on_bad=config.tasks.intake.on_bad)


def check_refused(tokens: TokenSet, *, on_bad: str) -> None:
    """Raise `DataError` if a run would refuse this data under `on_bad`."""
    refused = len(tokens.rejects)
    total = refused + sum(card.n_train + card.n_validation for card in tokens.cards)
    is_too_much = on_bad == "reject" and Intake.is_too_much(refused, total)
    if is_too_much or (on_bad == "error" and refused):
        raise DataError(
            f"{refused} of {total} rows refused, more than on_bad: {on_bad} allows; mend the data "
            "or set on_bad: skip"
        )


def report(tokens: TokenSet) -> str:
    """The table of tasks, its totals, and the first refused rows."""
    refused = Counter(reject["task"] for reject in tokens.rejects)
    n_rows = sum(card.n_train for card in tokens.cards)
    total = TaskCard(
        name="total",
        cap=None,
        weight=None,
        metric="",
        digest="",
        cuts=tokens.cuts,
        n_train=n_rows,
        n_validation=sum(card.n_validation for card in tokens.cards),
        mean_input_tokens=_mean([(c.mean_input_tokens, c.n_train) for c in tokens.cards]),
        mean_target_tokens=_mean([(c.mean_target_tokens, c.n_train) for c in tokens.cards]),
    )
    table = [_row(card, refused[card.name]) for card in tokens.cards]
    lines = [
        one_line(f"refused {reject['place']}: {reject['reason']} (task {reject['task']})")
        for reject in tokens.rejects[:SHOWN_REJECTS]
    ]
    if len(tokens.rejects) > SHOWN_REJECTS:
        lines.append(f"... and {len(tokens.rejects) - SHOWN_REJECTS} more")
    words = prose("".join(f"{line}\n" for line in lines))
    return render(HEADS, [*table, _row(total, len(tokens.rejects))]) + words


def show_rows(tokens: TokenSet, tokenizer: Any) -> str:
    """Three training rows as their tokens say them: what is read, and what is trained.

    The first ones of three tasks, spread over all; of fewer tasks their first ones.
    """
    n_tasks = len(tokens.cards)
    tasks = sorted({0, (n_tasks - 1) // 2, n_tasks - 1})
    rows = [(row, task) for row in range(SHOWN_ROWS) for task in tasks]
    there = [(row, task) for row, task in rows if row < len(tokens.cards[task].first_gaps)]
    lines = []
    for row, task in sorted(there[:SHOWN_ROWS], key=lambda place: place[::-1]):
        card, encoded = tokens.cards[task], tokens.train[task][row]
        gaps, (target, *others) = card.first_gaps[row], encoded.answers
        more = f", the first of {len(others) + 1} references" if others else ""
        lines += [
            f"row {row + 1} of {one_line(card.name)}: {len(encoded.input_ids)} tokens are read, "
            f"{len(target)} are trained{more}",
            f"  read:    {_words(encoded.input_ids, gaps.input, tokenizer)}",
            f"  trained: {_words(target, gaps.target, tokenizer)}",
        ]
    return prose("".join(f"{line}\n" for line in lines))


def _words(ids: Ids, gap: int, tokenizer: Any) -> str:
    """Tokens in words, special ones too, on one line; a mark where some were cut."""
    parts = [ids] if gap < 0 else [ids[:gap], ids[gap:]]
    texts = (
        tokenizer.decode(
            part.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        for part in parts
    )
    return printable(CUT.join(texts))


def _mean(means: Sequence[tuple[float, int]]) -> float:
    """The mean of means over some rows each."""
    return sum(mean * rows for mean, rows in means) / max(1, sum(rows for _, rows in means))


def _row(card: TaskCard, refused: int) -> list[str]:
    facts, counts = card.cuts.facts(), (card.n_train, card.n_validation)
    means = (card.mean_input_tokens, card.mean_target_tokens)
    shares = (facts["cut_input_share"], facts["cut_target_share"])
    return [
        one_line(card.name),
        card.metric,
        *map(str, counts),
        *(f"{mean:.1f}" for mean in means),
        *(f"{share:.1%}" for share in shares),
        *map(str, (card.cuts.dropped, refused)),
    ]
