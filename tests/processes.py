"""Starting the launch scripts as a user does, and reading what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def start(
    script: str,
    *arguments: str,
    ranks: int = 0,
    launcher: tuple[str, ...] = (),
    folder: Path = ROOT,
    accelerator: str = "cpu",
) -> subprocess.Popen[str]:
    """Start a script from the checkout: under the deepspeed launcher for `ranks`, alone for 0.

    What does not end in .py is a module. `launcher` is another launcher and its options, `folder`
    another working directory, and `accelerator` is DeepSpeed's name of what it runs on.
    """
    environment = {**os.environ, "DS_ACCELERATOR": accelerator, "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    binaries = Path(sys.executable).parent
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    is_module = not script.endswith(".py")
    command = [sys.executable, *(["-m"] if is_module else []), script]
    if launcher:
        command = [str(binaries / launcher[0]), *launcher[1:], script]
    elif ranks:
        command = [str(binaries / "deepspeed"), "--num_gpus", str(ranks)]
        command += ["--master_port", str(free_port()), *(["--module"] if is_module else []), script]
    else:
        environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for a started script and all that holds its output; it fails the test if that takes
    longer than `timeout` seconds."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(
            f"{process.args} took more than {timeout} s:\n{output[-4000:]}"
        ) from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def run(
    script: str,
    *arguments: str,
    ranks: int = 0,
    launcher: tuple[str, ...] = (),
    folder: Path = ROOT,
    accelerator: str = "cpu",
    timeout: float = 240.0,
) -> subprocess.CompletedProcess[str]:
    """Run a script as `start` starts it."""
    options: dict[str, Any] = {"launcher": launcher, "folder": folder, "accelerator": accelerator}
    return finish(start(script, *arguments, ranks=ranks, **options), timeout)


def succeed(
    script: str,
    *arguments: str,
    ranks: int = 0,
    folder: Path = ROOT,
    accelerator: str = "cpu",
    timeout: float = 240.0,
) -> str:
    """Run a script that must end well; returns what it printed."""
    options: dict[str, Any] = {"ranks": ranks, "folder": folder, "accelerator": accelerator}
    result = run(script, *arguments, timeout=timeout, **options)
    assert result.returncode == 0, f"exit code {result.returncode}:\n{result.stdout[-6000:]}"
    return result.stdout


def succeed_together(
    commands: Sequence[Sequence[str]],
    folder: Path,
    *,
    ranks: int = 0,
    inside: Path = ROOT,
    accelerator: str = "cpu",
    timeout: float = 480.0,
) -> str:
    """Run commands one after the other in one launch, each a script and its arguments.

    Starting a launch takes longer than most of what is tested. Returns what they printed; `folder`
    is for the list of them, `inside` the working directory.
    """
    file = folder / f"commands_of_{ranks}.json"
    file.write_text(json.dumps([(free_port(), command) for command in commands]))
    script = str(ROOT / "tests" / "distributed" / "programs" / "several.py")
    options: dict[str, Any] = {"ranks": ranks, "folder": inside, "accelerator": accelerator}
    return succeed(script, str(file), timeout=timeout, **options)


def run_code(code: str, *arguments: str, folder: Path) -> str:
    """Run code that must end well, in a process of its own that knows nothing of this one's paths;
    returns what it printed."""
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what differs from start to start."""
    times = ("seconds", "tokens_per_second")
    return [
        {key: value for key, value in line.items() if key not in times}
        for line in read_metrics(folder)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
