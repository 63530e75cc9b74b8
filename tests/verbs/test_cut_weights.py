"""A file of weights that is cut while a run uses it: the process ends, and says where it was."""

import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
import torch
from pathlib import Path
from mhr_scale.backbone.mapped_file import MappedFile
from mhr_scale.verbs.launching import guarded

torch.set_num_threads(1)  # a second thread on the cut page would end the process unannounced

def use_weights():
    file = Path(sys.argv[1])
    view = MappedFile(file).tensor(0, torch.float32, (1 << 20,))
    os.truncate(file, 0)
    view.sum()

guarded(use_weights)
"""


def test_the_place_in_the_program_is_told(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(4 << 20))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "weights")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in result.stderr
    assert "in use_weights" in result.stderr
