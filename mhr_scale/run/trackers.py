"""The trackers, one class each: TensorBoard, Weights & Biases, trackio, MLflow.

Each is the curves of one run: a run folder, or a job's folder in one, which all of its run's jobs
are grouped with. An id that the folder keeps finds them again after a restart or a move. Every step
is there once: a resumed run repeats steps with the same values, and the first ones count.
"""

import contextvars
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from mhr_scale.run.files import write_text

#: How long a service that cannot be reached may delay the end of a run.
FINISH_SECONDS = 120.0
#: How long MLflow waits for a server, and how often it asks again: its own settings, unless set.
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
#: What its database in a run folder needs besides it.
MLFLOW_LOCAL = ("sqlalchemy", "alembic")
#: What MLflow takes in one call, and in a name.
MLFLOW_BATCH = 1000
MLFLOW_NAME = 250


class Tracker(Protocol):
    """A destination for metrics besides the run folder."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step; a step may have several calls."""

    def close(self) -> None:
        """Flush everything and close."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """Whose curves a tracker shows, and where they go on."""

    folder: Path
    """The run folder, or a job's folder."""
    resume_step: int
    """The step the run resumes from, -1 for a new one."""
    job: str | None = None
    """The job's name; its run folder is `run`."""
    run: Path | None = None

    @property
    def root(self) -> Path:
        """The run folder."""
        return (self.run or self.folder).resolve()

    @property
    def project(self) -> str:
        """Name of the folder of run folders."""
        return self.root.parent.name or "mhr_scale"

    @property
    def name(self) -> str:
        """Name of the run or of the job."""
        return self.job or self.root.name

    @property
    def group(self) -> str | None:
        """Name of the run whose jobs belong together."""
        return self.root.name if self.job else None


class TensorBoard:
    """Event files in `<folder>/tensorboard`; steps that a resumed run repeats are purged."""

    def __init__(self, curves: Curves) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = str(curves.folder / "tensorboard")
        self._writer = SummaryWriter(place, purge_step=curves.resume_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; `WANDB_MODE=offline` needs no network.

    Its directory is `<folder>/wandb`. Of a step that is sent twice the service keeps the first.
    """

    def __init__(self, curves: Curves) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            login_timeout=30,
            reinit="create_new",  # the jobs of a wave are runs side by side
        )
        self._run = wandb.init(
            dir=str(curves.folder),
            project=curves.project,
            group=curves.group,
            name=curves.name,
            id=kept_id(curves.folder, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send the rest, as long as that takes no longer than `FINISH_SECONDS`."""
        self._run.finish()


class Trackio:
    """A run of trackio: local, in `TRACKIO_DIR`, unless `TRACKIO_SPACE_ID` or its kin are set.

    It sends in the background, and keeps on this machine what a server does not take.
    """

    def __init__(self, curves: Curves) -> None:
        import trackio

        name = kept_id(curves.folder, "trackio", lambda: f"{curves.name}-{secrets.token_hex(4)}")
        with redirect_stdout(StringIO()):  # it prints, and standard output is for results
            # in a context of its own, as `init` finishes the run that is current in its context
            self._run = contextvars.Context().run(
                trackio.init,
                project=curves.project,
                name=name,
                group=curves.group,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self._resume_step, self._next_step = curves.resume_step, self._run._next_step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step, unless an earlier start has."""
        if not self._resume_step < step < self._next_step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send the rest; what a server does not take in half a minute stays here."""
        with redirect_stdout(StringIO()):
            self._run.finish()


class MLflow:
    """A run of MLflow: at `MLFLOW_TRACKING_URI`, else in `<run folder>/mlflow/mlflow.db`."""

    def __init__(self, curves: Curves) -> None:
        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient, is_tracking_uri_set
        from mlflow.exceptions import MlflowException

        def find_experiment() -> str | None:
            found = client.get_experiment_by_name(curves.project)
            return None if found is None else str(found.experiment_id)

        def create() -> str:
            experiment = find_experiment()
            if experiment is None:
                try:
                    experiment = client.create_experiment(curves.project, artifact_location=place)
                except MlflowException:  # another rank was faster
                    experiment = find_experiment()
                    if experiment is None:
                        raise
            tags = {"group": curves.group} if curves.group else None
            return str(client.create_run(experiment, run_name=curves.name, tags=tags).info.run_id)

        uri = place = None
        local = curves.root / "mlflow"
        local.mkdir(parents=True, exist_ok=True)
        if not is_tracking_uri_set():
            uri, place = f"sqlite:///{local / 'mlflow.db'}", (local / "artifacts").as_uri()
        with (local / "making").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # two ranks that make its tables both fail
            self._client = client = MlflowClient(tracking_uri=uri)
            self._id = kept_id(curves.folder, "mlflow", create)
        client.update_run(self._id, status="RUNNING")
        self._resume_step = curves.resume_step
        self._last: dict[str, int] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send those numbers of a step that an earlier start has not sent."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {mlflow_name(name): value for name, value in values.items()}
        metrics = [
            Metric(name, float(value), now, step)
            for name, value in named.items()
            if not self._resume_step < step <= self._last_step(name)
        ]
        for start in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + MLFLOW_BATCH])

    def _last_step(self, name: str) -> int:
        """The last step that earlier starts have sent of a curve, -1 if none."""
        if name not in self._last:
            history = self._client.get_metric_history(self._id, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]

    def close(self) -> None:
        """Say that this start has ended."""
        self._client.set_terminated(self._id)


def mlflow_name(name: str) -> str:
    """A name as MLflow takes it: its characters, a plain relative path, not too long."""
    parts = [re.sub(r"[^\w\-. :]", "_", part).strip(".") for part in name.split("/")]
    return "/".join(part or "_" for part in parts)[:MLFLOW_NAME].rstrip("/")


def kept_id(folder: Path, kind: str, make: Callable[[], str]) -> str:
    """The id of a folder's curves, made once and stored in the folder: moves do not change it."""
    file = folder / kind / "mhr_scale_id.txt"
    if file.is_file() and (stored := file.read_text(encoding="utf-8").strip()):
        return stored
    new_id = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, new_id + "\n")
    return new_id


KINDS: dict[str, Callable[[Curves], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}
