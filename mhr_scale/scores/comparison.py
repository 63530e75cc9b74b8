"""The few-shot table, one line per variant, from the results of jobs.

Every score is in points. A variant is compared over the seeds in which all tasks of the run are
finished; the other seeds are left out and named.

The average relative gain over another variant, CrossFit's measure, is the mean over tasks of
(s - d) / d in per cent, with s and d the task's scores under the two, each the mean over the seeds
that both have finished. A task whose d is not above 0 has none; it is left out and named.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from mhr_scale.errors import one_line, some
from mhr_scale.run.tables import prose, render
from mhr_scale.scores.summary import aggregate


def compare(
    results: Sequence[Mapping[str, Any]],
    *,
    tasks: Iterable[str] = (),
    gain_over: str | None = None,
) -> dict[str, Any]:
    """The numbers of the table, from the results of jobs in any order.

    `tasks` are those of the run, by default the ones that have a result. With a task that has no
    result no seed is complete. `gain_over` is the variant that others' gain is measured against.
    """
    tasks = sorted({*tasks, *(result["task"] for result in results)})
    by_variant: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_variant[result["variant"]].append(result)
    variants = {name: _variant(jobs, tasks) for name, jobs in by_variant.items()}
    if gain_over in variants:
        base = by_variant[gain_over]
        for name in variants.keys() - {gain_over}:
            seeds = {*variants[name]["seeds"]} & {*variants[gain_over]["seeds"]}
            if seeds:
                pair = (_by_task(jobs, seeds) for jobs in (by_variant[name], base))
                variants[name] |= {"gain_over": gain_over, **_gain(*pair)}
    return {"tasks": tasks, "variants": variants}


def _by_task(results: Iterable[Mapping[str, Any]], seeds: Collection[int]) -> dict[str, float]:
    """The mean over seeds of every task's score."""
    scores: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if result["seed"] in seeds:
            scores[result["task"]].append(result["score"])
    return {task: fmean(found) for task, found in scores.items()}


def _gain(scores: Mapping[str, float], base: Mapping[str, float]) -> dict[str, Any]:
    """The average relative gain in per cent, and the tasks that have none."""
    gains = [100.0 * (scores[task] - base[task]) / base[task] for task in base if base[task] > 0.0]
    without = sorted(task for task in base if base[task] <= 0.0)
    return {"relative_gain": fmean(gains) if gains else None, "without_gain": without}


def _variant(results: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    by_seed: dict[int, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        by_seed[result["seed"]][result["task"]] = result
    complete = {seed: jobs for seed, jobs in sorted(by_seed.items()) if len(jobs) == len(tasks)}
    values: dict[str, Any] = {
        "kind": results[0]["kind"],
        "adapter": results[0]["adapter"],
        "multi_task_numbers": results[0]["source_numbers"],
        "adaptation_numbers": results[0]["trained_numbers"],
        "metrics": sorted({result["metric"] for result in results}),
        "selected_on": _said(results, "selected_on"),
        "precisions": sorted(
            {as_one(r.get("precision"), r.get("stored_precision")) for r in results} - {""}
        ),
        "seeds": list(complete),
        "incomplete_seeds": sorted(set(by_seed) - set(complete)),
    }
    if complete:
        summaries = [
            {
                "tasks": {task: {"mean": result["score"]} for task, result in jobs.items()},
                "mean_over_tasks": sum(job["score"] for job in jobs.values()) / len(jobs),
            }
            for jobs in complete.values()
        ]
        aggregates = aggregate(summaries)
        values |= {
            "mean": aggregates["mean_then_std"][0],
            "std_over_seeds": aggregates["mean_then_std"][1],
            "mean_of_medians": aggregates["median_then_mean"],
            "median_per_task": aggregates["median_per_task"],
        }
    return values


def as_one(computed: object, stored: object) -> str:
    """The precision of a backbone, and that in which its adapter was stored, if not float32."""
    texts = [str(computed)] if computed else []
    texts += [f"adapter stored in {stored}"] if stored not in (None, "", "float32") else []
    return ", ".join(texts)


def _said(results: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The different values of a fact of some results, as far as they say it."""
    return sorted({str(result[name]) for result in results if result.get(name)})


def marked(name: str, values: Mapping[str, Any]) -> str:
    """A variant's name, with a mark if the reported rows selected its checkpoints."""
    name = one_line(name)
    return f"{name} *" if "test" in values["selected_on"] else name


def legend(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of a table of variants has to know about marks and mixed precision."""
    lines = []
    if any("test" in values["selected_on"] for values in variants.values()):
        lines.append(
            "* the best checkpoint was selected on the reported test rows (selection.on: test): "
            "optimistic"
        )
    precisions = {name: " or ".join(values["precisions"]) for name, values in variants.items()}
    if len(set(precisions.values())) > 1:
        listed = ", ".join(
            f"{one_line(name)} {said or 'unknown'}" for name, said in precisions.items()
        )
        lines.append(f"precision differs, and scores with it: {listed}")
    lines += sorted(
        {
            f"gain: average relative gain over {one_line(values['gain_over'])}, in per cent"
            + (f", without {some(without)} (not above 0 there)" if without else "")
            for values in variants.values()
            if has_gain(values)
            for without in [values["without_gain"]]
        }
    )
    return lines


def has_gain(values: Mapping[str, Any]) -> bool:
    """Whether a variant has an average relative gain over another."""
    return values.get("relative_gain") is not None


def table(compared: Mapping[str, Any]) -> str:
    """Two tables: a line per variant, and a line per task."""
    variants = compared["variants"]
    heads = ["variant", "multi-task", "adaptation", "mean", "+- seeds", "medians", "seeds"]
    gains = any(map(has_gain, variants.values()))
    heads += ["gain"] * gains
    rows = []
    for name, values in variants.items():
        counts = (values["multi_task_numbers"], values["adaptation_numbers"])
        means = ["-", "-", "-"]
        if values["seeds"]:
            found = (values["mean"], values["std_over_seeds"], values["mean_of_medians"])
            means = [f"{mean:.2f}" for mean in found]
        seeds = str(len(values["seeds"]))
        if values["incomplete_seeds"]:
            seeds += f" (unfinished: {', '.join(map(str, values['incomplete_seeds']))})"
        gain = [f"{values['relative_gain']:+.2f}" if has_gain(values) else "-"] * gains
        rows.append([marked(name, values), *map(_short, counts), *means, seeds, *gain])
    text = render(heads, rows) + prose("".join(f"{line}\n" for line in legend(variants)))
    complete = {name: values for name, values in variants.items() if values["seeds"]}
    return f"{text}\n{_per_task(complete, compared['tasks'])}" if complete else text


def _per_task(variants: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Median over seeds of every task and variant."""
    rows = [
        [
            one_line(task),
            *(f"{values['median_per_task'][task]:.2f}" for values in variants.values()),
        ]
        for task in tasks
    ]
    return render(["task (median over seeds)", *map(one_line, variants)], rows)


def _short(count: int) -> str:
    """A number of parameters as papers write it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
