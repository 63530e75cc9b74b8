"""The page of a report, put together from the sections of the other modules."""

from collections import Counter
from collections.abc import Sequence

from mhr_scale.errors import counted
from mhr_scale.report import analysed, evaluations, few_shot, learning_curves, overview, settings
from mhr_scale.report.page import Page, Section
from mhr_scale.report.runs import Kind, Run

#: A run of each kind.
NOUNS: dict[Kind, str] = {
    "pre-training": "pre-training run",
    "average": "average",
    "evaluation": "evaluation",
    "few-shot": "few-shot run",
    "fine-tuning": "fine-tuning run",
    "analysis": "analysis run",
    "job": "job",
}


def build(runs: Sequence[Run], *, title: str | None = None) -> Page:
    """The page of some runs of any kinds; sections without content are left out."""
    sections: list[Section | None] = [
        overview.overview(runs),
        few_shot.few_shot(runs),
        evaluations.evaluations(runs),
        evaluations.extra_steps(runs),
        learning_curves.learning(runs),
        learning_curves.by_task(runs),
        *analysed.analysed(runs),
        settings.settings(runs),
        settings.provenance(runs),
    ]
    kinds = Counter(run.kind for run in runs)
    counts = ", ".join(counted(number, NOUNS[kind]) for kind, number in kinds.items())
    return Page(
        title=title or f"Report: {runs[0].label if len(runs) == 1 else f'{len(runs)} runs'}",
        lead=f"Made from run folders ({counts}); every number stands in their files.",
        sections=[section for section in sections if section is not None],
    )
