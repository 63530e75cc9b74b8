"""Rows of P3 as small files, and their reading."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from mhr_scale.config import IntakeConfig
from mhr_scale.tasks.t0 import p3
from mhr_scale.tasks.task import Intake

GOOD = {"inputs_pretokenized": "\nask\n", "targets_pretokenized": "\nyes\n"}


def read(folder, config, *, split="train", max_rows=None, intake=None, **policy):
    return p3.read_examples(
        p3.open_source(str(folder)),
        config,
        split=split,
        max_rows=max_rows,
        policy=IntakeConfig(**policy),
        intake=intake or Intake(),
    )


def write_table(folder, rows, config="c", file="train-00000-of-00001.parquet", **types):
    (folder / config).mkdir(exist_ok=True)
    columns = {key: pa.array([row[key] for row in rows], types.get(key)) for key in rows[0]}
    pq.write_table(pa.table(columns), folder / config / file)
    return folder


def write_lines(folder, rows, config="c", file="train.jsonl"):
    (folder / config).mkdir(exist_ok=True)
    (folder / config / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
