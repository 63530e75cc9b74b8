"""`pretrain` with a rank that fails: `pretrain_failing.py HOW STEP FOLDER RECIPE ...`.

Each rank leaves its process id in FOLDER. HOW: `kill`, `raise`, `mistake` and `hang` happen to rank
1 before the step, `kill_once` as well, but not in a second attempt; `slow` makes steps last, on all
ranks.
"""

import os
import signal
import sys
import time
from pathlib import Path

from mhr_scale.config import PretrainConfig
from mhr_scale.errors import DataError
from mhr_scale.run import stopping
from mhr_scale.training.trainer import Trainer
from mhr_scale.verbs import launching
from mhr_scale.verbs.launching import main
from mhr_scale.verbs.pretrain import pretrain

words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
how, step, folder, sys.argv[1:] = words[0], int(words[1]), Path(words[2]), words[3:]
(folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
accumulate = Trainer.accumulate


def fail(trainer):
    if how == "slow":
        (folder / f"step.{trainer.step}").touch()
        time.sleep(0.3)
    if trainer.step != step or trainer.engine.rank != 1 or how == "slow":
        return
    if how == "raise":
        raise LookupError("this rank has had enough")
    if how == "mistake":
        launching.PATIENCE_SECONDS = 2.0
        raise DataError("train.jsonl:7: gone bad; mend it")
    if how == "hang":
        stopping.DEADLINE_SECONDS = 2.0
        time.sleep(600)
    if how == "kill" or os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def accumulate_or_fail(trainer, micro_batches):
    fail(trainer)
    return accumulate(trainer, micro_batches)


Trainer.accumulate = accumulate_or_fail
main(PretrainConfig, pretrain, about="pretrain_failing.py RECIPE")
