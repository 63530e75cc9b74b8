"""The few-shot table, one line per variant, from the results of jobs.

Every score is in points, 0 to 100. A variant is compared over the seeds in which all tasks of the
run are finished; the other seeds are left out and named.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mhr_scale.errors import one_line
from mhr_scale.scores.summary import aggregate


def compare(results: Sequence[Mapping[str, Any]], *, tasks: Iterable[str] = ()) -> dict[str, Any]:
    """The numbers of the table, from the results of jobs in any order.

    `tasks` are those of the run, by default the ones that have a result. With a task that has no
    result no seed is complete.
    """
    tasks = sorted({*tasks, *(result["task"] for result in results)})
    by_variant: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_variant[result["variant"]].append(result)
    return {
        "tasks": tasks,
        "variants": {name: _variant(jobs, tasks) for name, jobs in by_variant.items()},
    }


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
    return lines


def table(compared: Mapping[str, Any]) -> str:
    """Two tables as lines of text: a line per variant, and a line per task."""
    variants = compared["variants"]
    names = {name: marked(name, values) for name, values in variants.items()}
    width = max(len("variant"), *(len(name) for name in names.values()))
    lines = [
        f"{'variant':{width}}  {'multi-task':>10}  {'adaptation':>10}  {'mean':>6}  "
        f"{'+- seeds':>8}  {'medians':>7}  seeds"
    ]
    for name, values in variants.items():
        counts = (values["multi_task_numbers"], values["adaptation_numbers"])
        line = f"{names[name]:{width}}  {_short(counts[0]):>10}  {_short(counts[1]):>10}  "
        if values["seeds"]:
            line += f"{values['mean']:6.2f}  {values['std_over_seeds']:8.2f}  "
            line += f"{values['mean_of_medians']:7.2f}  {len(values['seeds'])}"
        else:
            line += f"{'-':>6}  {'-':>8}  {'-':>7}  0"
        if values["incomplete_seeds"]:
            line += f" (unfinished: {', '.join(map(str, values['incomplete_seeds']))})"
        lines.append(line)
    lines += legend(variants)
    complete = {name: values for name, values in variants.items() if values["seeds"]}
    if complete:
        lines += ["", *_per_task(complete, compared["tasks"])]
    return "\n".join(lines) + "\n"


def _per_task(variants: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Median over seeds of every task and variant."""
    names = [one_line(task) for task in tasks]
    width = max(map(len, ["task (median over seeds)", *names]))
    columns = {name: max(7, len(name)) for name in variants}
    head = f"{'task (median over seeds)':{width}}"
    lines = [head + "".join(f"  {name:>{columns[name]}}" for name in variants)]
    for task, shown in zip(tasks, names, strict=True):
        cells = [
            f"  {values['median_per_task'][task]:{columns[name]}.2f}"
            for name, values in variants.items()
        ]
        lines.append(f"{shown:{width}}" + "".join(cells))
    return lines


def _short(count: int) -> str:
    """A number of parameters as papers write it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
