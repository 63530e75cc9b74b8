"""Metrics of the evaluate library beside ours: `metric: evaluate:NAME_OR_FOLDER` in `tasks.yaml`.

NAME is a metric of the hub, FOLDER a local one (relative to the current folder) that holds
`<its own name>.py`; either is code, and is run. A metric is asked about one generated answer at a
time, and a task's score is the mean over its examples, as with our own: what only a whole list has,
such as corpus BLEU or a correlation, is not that. References are handed over together where the
metric takes several, else the best of them counts. Metrics of other things than texts are refused.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from mhr_scale.errors import DataError, first_line, shortened

TextMetric = Callable[[str, Sequence[str]], float]

#: What the names of these metrics begin with.
PREFIX = "evaluate:"
#: How far from 0 and 100 points may lie by rounding.
ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricOptions:
    """What `tasks.yaml` may say of such a metric, under `metric_options`.

    `value`: which of its results counts, where it has several. `times`: from its scale to points, 0
    to 100. `config`: one of its configurations. `arguments`: handed to its `compute`.
    """

    value: str | None = None
    times: float = 100.0
    config: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def open_metric(name: str, options: MetricOptions | None = None) -> TextMetric:
    """The metric of this name, with its prefix, found good; raises `DataError` otherwise."""
    options = options or MetricOptions()
    metric = _Metric(name, _load(name.removeprefix(PREFIX), options.config), options)
    metric("a", ["a"])
    return metric


class _Metric:
    """A loaded metric as a function of one answer and its references."""

    def __init__(self, name: str, module: Any, options: MetricOptions) -> None:
        from datasets import Value

        self._name, self._module, self._options = name, module, options
        forms = module.features if isinstance(module.features, list) else [module.features]
        self._takes_several = any(not isinstance(form.get("references"), Value) for form in forms)

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        """The points of an answer; raises `DataError` where the metric fails or has none."""
        asked = [list(references)] if self._takes_several else references
        try:
            found = [self._compute(prediction, reference) for reference in asked]
        except Exception as error:
            raise DataError(
                f"metric '{self._name}' does not score the answer {shortened(prediction)} by its "
                f"references ({first_line(error)}); use another one, or see metric_options"
            ) from error
        return max(self._points(results) for results in found)

    def _compute(self, prediction: str, reference: str | list[str]) -> Mapping[str, Any]:
        arguments = self._options.arguments
        found = self._module.compute(predictions=[prediction], references=[reference], **arguments)
        return dict(found)

    def _points(self, results: Mapping[str, Any]) -> float:
        """The value that counts, in points."""
        numbers = {key: value for key, value in results.items() if _is_number(value)}
        wanted = self._options.value or (next(iter(numbers)) if len(numbers) == 1 else None)
        if wanted not in numbers:
            if not numbers:
                raise DataError(
                    f"metric '{self._name}' has no finite number for a single answer (it has: "
                    f"{', '.join(results)}); use another one"
                )
            asked = "several values" if wanted is None else f"no value '{wanted}'"
            raise DataError(
                f"metric '{self._name}' has {asked} (it has: {', '.join(numbers)}); set "
                "metric_options.value"
            )
        points = float(numbers[wanted]) * self._options.times
        if not -ROUNDING <= points <= 100.0 + ROUNDING:
            raise DataError(
                f"metric '{self._name}': {wanted} {numbers[wanted]} times {self._options.times} is "
                "no number of points from 0 to 100; set metric_options.times"
            )
        return min(max(points, 0.0), 100.0)


def _is_number(value: Any) -> bool:
    """Whether a result is one finite number, be it numpy's."""
    try:
        return not isinstance(value, str | bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


@cache
def _load(source: str, config: str | None) -> Any:
    """A metric as the library has it; raises `DataError` if there is none."""
    folder = Path(source).resolve()
    path = str(folder) if (folder / f"{folder.name}.py").is_file() else source
    try:
        return _library().load(path, config, module_type="metric", keep_in_memory=True, seed=0)
    except Exception as error:
        raise DataError(
            f"metric '{PREFIX}{source}' cannot be loaded ({first_line(error)}); give a metric of "
            f"the hub that can be reached, or a folder that holds {Path(source).name}.py"
        ) from error


def _library() -> Any:
    """The library, which `launch/evaluate.py` hides where its folder is searched first."""
    if "evaluate" not in sys.modules:
        folders = [place for place in sys.path if not Path(place, "evaluate.py").is_file()]
        spec = PathFinder.find_spec("evaluate", folders)
        if spec is None or spec.loader is None:
            raise ImportError("the evaluate library is not installed")
        module = sys.modules["evaluate"] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules["evaluate"]
            raise
    return sys.modules["evaluate"]
