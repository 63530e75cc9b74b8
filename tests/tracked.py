"""What trackers have of a run, read back from their files, or from a stand-in for a package."""

import struct
import sys
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from processes import read_metrics

from mhr_scale.run.trackers import kept_id
from mhr_scale.run.tracking import numbers_of

#: The curves of a tracker: steps and values by name.
Shown = dict[str, list[tuple[int, float]]]


def tensorboard_steps(folder: Path) -> Shown:
    """What TensorBoard shows of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    names = shown.Tags()["scalars"]
    return {name: [(one.step, one.value) for one in shown.Scalars(name)] for name in names}


def wandb_records(file: Path) -> list[Any]:
    """The records of an offline run: blocks of 32 KiB, each record with checksum, length, type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is padding
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def wandb_history(file: Path) -> list[dict[str, str]]:
    rows = (record.history for record in wandb_records(file) if record.HasField("history"))
    return [
        {"/".join(item.nested_key) or item.key: item.value_json for item in row.item}
        for row in rows
    ]


def expected(folder: Path) -> Shown:
    """The numbers of metrics.jsonl by name."""
    found: Shown = {}
    for line in read_metrics(folder):
        for name, value in numbers_of(line).items():
            if name != "step":
                found.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-5)))
    return found


def trackio_shown(folder: Path, project: str) -> Shown:
    """What trackio has of a folder's run."""
    import trackio

    name = kept_id(folder, "trackio", str)
    if isinstance(trackio, TrackioStandIn):
        lines = trackio.runs[project, name].lines
    else:
        from trackio.sqlite_storage import SQLiteStorage

        lines = SQLiteStorage.get_logs(project, run=name)
    found: Shown = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        for key in line.keys() - {"step", "timestamp"}:
            found.setdefault(key, []).append((line["step"], line[key]))
    return found


def mlflow_shown(folder: Path, run: Path, names: Any) -> Shown:
    """What MLflow has of a job's run, which has ended, in the group of its run folder."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.resolve()}/mlflow/mlflow.db")
    run_id = kept_id(folder, "mlflow", str)
    found = client.get_run(run_id)
    assert found.info.run_name == str(folder.relative_to(run / "jobs"))
    assert (found.info.status, found.data.tags["group"]) == ("FINISHED", run.name)
    histories = {name: client.get_metric_history(run_id, name) for name in names}
    return {
        name: [(one.step, one.value) for one in history]
        for name, history in histories.items()
        if history
    }


class TrackioStandIn(ModuleType):
    """The calls of trackio that we use; a run ends when its context starts another one."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: dict[tuple[str, str], Any] = {}
        self._current: ContextVar[Any] = ContextVar("current", default=None)

    def init(self, *, project: str, name: str, resume: str, **options: Any) -> Any:
        assert resume == "allow"
        assert options.keys() == {"group", "embed", "auto_log_cpu", "auto_log_gpu"}
        print("created")
        if (previous := self._current.get()) is not None:
            previous.finish()
        lines = self.runs[project, name].lines if (project, name) in self.runs else []
        next_step = max((line["step"] + 1 for line in lines), default=0)
        run = SimpleNamespace(lines=lines, _next_step=next_step, is_open=True, **options)

        def log(values: dict[str, float], *, step: int) -> None:
            assert run.is_open
            lines.append({"step": step, **values})

        run.log, run.finish = log, lambda: setattr(run, "is_open", False)
        self.runs[project, name] = run
        self._current.set(run)
        return run


def mlflow_stand_in() -> dict[str, ModuleType]:
    """Modules with the calls of MLflow that we use."""
    experiments: dict[str, str] = {}
    runs: dict[str, Any] = {}

    class MlflowException(Exception):
        pass

    class Metric(SimpleNamespace):
        def __init__(self, key: str, value: float, timestamp: int, step: int) -> None:
            super().__init__(key=key, value=value, timestamp=timestamp, step=step)

    class MlflowClient:
        def __init__(self, tracking_uri: str | None) -> None:
            assert tracking_uri is not None
            self.uri = tracking_uri

        def get_experiment_by_name(self, name: str) -> Any:
            known = experiments.get(self.uri + name)
            return None if known is None else SimpleNamespace(experiment_id=known)

        def create_experiment(self, name: str, *, artifact_location: str) -> str:
            if self.uri + name in experiments:
                raise MlflowException("exists")
            return experiments.setdefault(self.uri + name, str(len(experiments)))

        def create_run(self, experiment: str, *, run_name: str, tags: Any) -> Any:
            assert experiment in experiments.values()
            info = SimpleNamespace(run_id=f"run{len(runs)}", run_name=run_name, status="RUNNING")
            data = SimpleNamespace(tags=tags)
            runs[info.run_id] = SimpleNamespace(info=info, data=data, metrics=[])
            return runs[info.run_id]

        def get_run(self, run_id: str) -> Any:
            return runs[run_id]

        def update_run(self, run_id: str, *, status: str) -> None:
            runs[run_id].info.status = status

        def log_batch(self, run_id: str, *, metrics: list[Metric]) -> None:
            assert runs[run_id].info.status == "RUNNING"
            assert 0 < len(metrics) <= 1000
            runs[run_id].metrics += metrics

        def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
            return [metric for metric in runs[run_id].metrics if metric.key == key]

        def set_terminated(self, run_id: str) -> None:
            self.update_run(run_id, status="FINISHED")

    modules = {
        name: ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.exceptions")
    }
    vars(modules["mlflow"]).update(MlflowClient=MlflowClient, is_tracking_uri_set=lambda: False)
    vars(modules["mlflow.entities"]).update(Metric=Metric)
    vars(modules["mlflow.exceptions"]).update(MlflowException=MlflowException)
    return modules


def put_in_place(patch: pytest.MonkeyPatch, name: str, *, is_real: bool) -> None:
    """A tracker's package in the process: the real one, or skip the test; or its stand-in."""
    if is_real:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install .[trackers]")
        return
    modules = {"trackio": TrackioStandIn()} if name == "trackio" else mlflow_stand_in()
    for module, stand_in in modules.items():
        patch.setitem(sys.modules, module, stand_in)
