"""`adapt`, killed without warning before a step: `adapt_killed.py STEP RECIPE ...`."""

import os
import signal
import sys

from mhr_scale.config import AdaptConfig
from mhr_scale.jobs.wave import Wave
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.launching import main

words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
last, sys.argv[1:] = int(words[0]), words[1:]
train_step = Wave.train_step


def train_until_killed(self, *arguments, **options):
    if self.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, *arguments, **options)


Wave.train_step = train_until_killed
main(AdaptConfig, adapt, about="adapt_killed.py RECIPE")
