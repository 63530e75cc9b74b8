"""The verb `data`: read and tokenise the tasks of a recipe, and print what they hold.

With `run.token_cache` it fills the cache from which later runs of the recipe read their tokens.
"""

from collections import Counter
from collections.abc import Sequence

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import PretrainConfig
from mhr_scale.errors import DataError
from mhr_scale.rows.encode import Cuts
from mhr_scale.rows.tokens import TokenSet, open_tokens
from mhr_scale.run.runlog import rank
from mhr_scale.run.streams import write_result
from mhr_scale.run.tables import prose, render
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
    if rank() == 0:
        write_result(report(tokens))
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
    heads = ["task", "train", "held out", "mean in", "mean out", "cut in", "cut out"]
    table = [
        _row(
            card.name,
            (card.n_train, card.n_validation),
            (card.mean_input_tokens, card.mean_target_tokens),
            card.cuts,
            refused[card.name],
        )
        for card in tokens.cards
    ]
    rows = sum(card.n_train for card in tokens.cards)
    means = [
        sum(getattr(card, name) * card.n_train for card in tokens.cards) / max(1, rows)
        for name in ("mean_input_tokens", "mean_target_tokens")
    ]
    held_out = sum(card.n_validation for card in tokens.cards)
    table.append(_row("total", (rows, held_out), means, tokens.cuts, len(tokens.rejects)))
    lines = [
        f"refused {reject['place']}: {reject['reason']} (task {reject['task']})"
        for reject in tokens.rejects[:SHOWN_REJECTS]
    ]
    if len(tokens.rejects) > SHOWN_REJECTS:
        lines.append(f"... and {len(tokens.rejects) - SHOWN_REJECTS} more")
    words = prose("".join(f"{line}\n" for line in lines))
    return render([*heads, "dropped", "refused"], table) + words


def _row(
    name: str, counts: Sequence[int], means: Sequence[float], cuts: Cuts, refused: int
) -> list[str]:
    facts = cuts.facts()
    shares = [f"{facts[key]:.1%}" for key in ("cut_input_share", "cut_target_share")]
    numbers = [*map(str, counts), *(f"{mean:.1f}" for mean in means), *shares]
    return [name, *numbers, str(cuts.dropped), str(refused)]
