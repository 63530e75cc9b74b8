"""The verb `data`: read and tokenise the tasks of a recipe, and print what they hold.

With `run.token_cache` it fills the cache from which later runs of the recipe read their tokens.
"""

import sys
from collections import Counter

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import PretrainConfig
from mhr_scale.errors import DataError, one_line
from mhr_scale.rows.tokens import TaskCard, TokenSet, open_tokens
from mhr_scale.tasks.task import Intake

SHOWN_REJECTS = 10


def check_data(config: PretrainConfig) -> None:
    """Print counts, lengths, cuts and refused rows per task.

    Raises `DataError` if a run of this recipe would refuse its data.
    """
    blueprint = read_blueprint(config.backbone)
    tokenizer = load_tokenizer(config.backbone, blueprint)
    policy = getattr(config.tasks, "intake", None)
    tokens = open_tokens(
        config.tasks,
        tokenizer,
        config.batch,
        blueprint.family,
        cache=config.run.token_cache,
        on_bad="skip",
    )
    sys.stdout.write(report(tokens))
    check_refused(tokens, on_bad=policy.on_bad if policy else "reject")


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
    n_rows = max(1, sum(card.n_train for card in tokens.cards))
    total = TaskCard(
        name="total",
        cap=None,
        weight=None,
        metric="",
        digest="",
        cuts=tokens.cuts,
        n_train=n_rows,
        n_validation=sum(card.n_validation for card in tokens.cards),
        mean_input_tokens=sum(c.mean_input_tokens * c.n_train for c in tokens.cards) / n_rows,
        mean_target_tokens=sum(c.mean_target_tokens * c.n_train for c in tokens.cards) / n_rows,
    )
    name = max(len(card.name) for card in (*tokens.cards, total))
    metric = max(len("metric"), *(len(card.metric) for card in tokens.cards))
    lines = [
        f"{'task':{name}}  {'metric':{metric}} {'train':>8} {'held out':>8} {'in':>6} {'out':>6} "
        f"{'cut in':>7} {'cut out':>7} {'dropped':>7} {'refused':>7}   (in, out: mean tokens)"
    ]
    for card in (*tokens.cards, total):
        facts = card.cuts.facts()
        n_refused = len(tokens.rejects) if card is total else refused[card.name]
        lines.append(
            f"{card.name:{name}}  {card.metric:{metric}} {card.n_train:8} {card.n_validation:8} "
            f"{card.mean_input_tokens:6.1f} {card.mean_target_tokens:6.1f} "
            f"{facts['cut_input_share']:7.1%} {facts['cut_target_share']:7.1%} "
            f"{card.cuts.dropped:7} {n_refused:7}"
        )
    for reject in tokens.rejects[:SHOWN_REJECTS]:
        line = f"refused {reject['place']}: {reject['reason']} (task {reject['task']})"
        lines.append(one_line(line))
    if len(tokens.rejects) > SHOWN_REJECTS:
        lines.append(f"... and {len(tokens.rejects) - SHOWN_REJECTS} more")
    return "\n".join(lines) + "\n"
