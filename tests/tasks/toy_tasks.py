"""The toy suite at a small size: all its tasks, and all examples of one."""

from mhr_scale.config import ToyTasks
from mhr_scale.tasks import toy

CONFIG = ToyTasks(suite="toy", n_tasks=20, train_examples=30, validation_examples=10)


def folds(task):
    return {"train": task.train, "validation": task.validation, "test": task.test}


def examples_of(task):
    return [example for fold in folds(task).values() for example in fold]


def everything(config=CONFIG):
    return [*toy.make_tasks(config), *toy.held_out_tasks(config)]
