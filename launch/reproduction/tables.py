"""tables.md: results.json and claims.json as tables for readers.

Every number comes from these two files.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reproduction.statistics import mean_and_std

NOTHING = "-"


def write(results: Mapping[str, Any], claims: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = ["# Reproduction at small scale\n"]
    if results["quick"]:
        parts.append(
            "**Quick: the same way with three training steps. Its figures tell nothing.**\n"
        )
    if results["failed"]:
        parts.append(f"Units that failed, or waited for one: {', '.join(results['failed'])}.\n")
    for suite in results["suites"].values():
        seeds = ", ".join(map(str, suite["seeds"]))
        parts.append(f"## {suite['title']}\n\nMean +- standard deviation over seeds {seeds}.\n")
        parts += [_few_shot(suite), _zero_shot(suite), _alignment(suite), _rates(suite)]
    parts.append(_claims(claims))
    return "\n".join(part for part in parts if part)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    text = ""
    for line in [head, ["---"] * len(head), *rows]:
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in line]
        text += f"| {' | '.join(cells)} |\n"
    return text


def spread(values: Mapping[str, float] | None, *, digits: int = 1) -> str:
    """Mean and standard deviation over seeds; with one seed, a remark instead of the latter."""
    if not values:
        return NOTHING
    mean, std = mean_and_std(list(values.values()))
    return f"{mean:.{digits}f}" + (" (1 seed)" if std is None else f" +- {std:.{digits}f}")


def _few_shot(suite: Mapping[str, Any]) -> str:
    rows = []
    for method in suite["methods"]:
        for way in method["ways"]:
            key = f"few_shot/{way}"
            counts = suite["parameters"].get(key)
            numbers = [
                f"{counts[name]:,}" if counts else NOTHING for name in ("multi_task", "adaptation")
            ]
            score = spread(suite["measures"].get(key))
            rows.append([way, *numbers, score, method["note"]])
    head = ("method", "multi-task numbers", "adaptation numbers", suite["metric"], "note")
    return f"### Few-shot, {suite['metric']}\n\n" + markdown(head, rows)


def _zero_shot(suite: Mapping[str, Any]) -> str:
    rows = [
        [way, *(spread(suite["measures"].get(f"zero_shot/{way}/{k}")) for k in suite["steps"])]
        for way in suite["zero_shot"]
    ]
    head = ("method", *(f"k = {k}" for k in suite["steps"]))
    return f"### Zero-shot after k extra steps, {suite['metric']}\n\n" + markdown(head, rows)


def _alignment(suite: Mapping[str, Any]) -> str:
    def row(kind: str, name: str) -> list[str]:
        keys = (f"{kind}/{regime}/{name}" for regime in suite["regimes"])
        return [spread(suite["measures"].get(key), digits=3) for key in keys]

    rows = [
        [name, *row("alignment", name), *row("loss", name)]
        for name in (method["name"] for method in suite["methods"])
        if any(f"alignment/{regime}/{name}" in suite["measures"] for regime in suite["regimes"])
    ]
    head = (
        "method",
        *(f"mean cosine, {regime}" for regime in suite["regimes"]),
        *(f"held-out loss, {regime}" for regime in suite["regimes"]),
    )
    return "### Gradient alignment of training tasks, and loss on them\n\n" + markdown(head, rows)


def _rates(suite: Mapping[str, Any]) -> str:
    rows = []
    for family, rates in suite["rates"]["chosen"].items():
        pretrain = ", ".join(f"{regime} {lr:g}" for regime, lr in rates["pretrain"].items())
        adapt = [
            _rate(kind, rate, "routing" in rates["adapt"]) for kind, rate in rates["adapt"].items()
        ]
        rows.append([family, pretrain, "; ".join(adapt)])
    title = (
        "### Learning rates, chosen on training tasks\n\n"
        f"{len(suite['search_tasks'])} of the training tasks were adapted to, the others trained "
        "on; no task that the study holds out was among them. The whole grid is in "
        "results.json.\n\n"
    )
    return title + markdown(("method", "pre-training", "adaptation"), rows)


def _rate(kind: str, rate: Mapping[str, float], is_routed: bool) -> str:
    """The learning rates that a way to adapt uses."""
    words = [] if kind == "routing" else [f"{rate['lr']:g}"]
    if kind == "routing" or (kind == "full" and is_routed):
        words.append(f"logits {rate['routing_lr']:g}")
    return f"{kind}: {', '.join(words)}"


def _claims(claims: Mapping[str, Any]) -> str:
    rows = [_claim(finding) for finding in claims["findings"]]
    head = (
        "claim",
        "in the paper",
        "suite",
        "mean difference [95 % interval]",
        "std",
        "p t (Holm)",
        "p flip (Holm)",
        "verdict",
    )
    tested = sum(finding["p_t"] is not None for finding in claims["findings"])
    skipped = [[entry["text"], entry["place"], entry["why"]] for entry in claims["not_run"]]
    return (
        f"## Claims\n\n{claims['rule']} Holm's correction is over all {tested} comparisons.\n\n"
        + markdown(head, rows)
        + "\n### Not run\n\n"
        + markdown(("claim", "in the paper", "why"), skipped)
    )


def _claim(finding: Mapping[str, Any]) -> list[str]:
    claim = finding["claim"]
    parts = list(finding["parts"].values())
    digits = 3 if claim["terms"][0].startswith("alignment/") else 1
    differences = "; ".join(_interval(part, digits) for part in parts) or finding["reason"]
    stds = "; ".join(_number(part["std"], digits) for part in parts) or NOTHING
    margin = f" (margin {finding['margin']:g})" if claim["kind"] == "equal" else ""
    return [
        claim["text"] + margin,
        claim["place"],
        finding["suite"],
        differences,
        stds,
        _p(finding["p_t"], finding["p_t_holm"]),
        _p(finding["p_flip"], finding["p_flip_holm"]),
        f"**{finding['verdict']}**",
    ]


def _interval(part: Mapping[str, Any], digits: int) -> str:
    ends = f" [{part['low']:+.{digits}f}, {part['high']:+.{digits}f}]" if part["n"] > 1 else ""
    return f"{part['mean']:+.{digits}f}{ends}"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _p(raw: float | None, adjusted: float | None) -> str:
    return NOTHING if raw is None or adjusted is None else f"{raw:.3g} ({adjusted:.3g})"
