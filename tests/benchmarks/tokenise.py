"""What tokenising once costs: rows and tokens per second on one core, and bytes per row on disk.

python tests/benchmarks/tokenise.py FOLDER [TOKENIZER]

FOLDER holds JSONL tasks (suite jsonl); TOKENIZER is a folder or hub id, by default ByT5's. Reading
and validating the rows is timed apart from tokenising and writing them.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"

from transformers import AutoTokenizer, ByT5Tokenizer

from mhr_scale.config import BatchConfig, JsonlTasks
from mhr_scale.families.t5 import GATED
from mhr_scale.rows.tokens import open_tokens
from mhr_scale.tasks.suites import open_suite


def main() -> None:
    """Time one reading and one full build, three times; print the medians."""
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2]) if sys.argv[2:] else ByT5Tokenizer()
    config = JsonlTasks(suite="jsonl", folder=sys.argv[1])
    readings, builds = [], []
    for _ in range(3):
        begun = time.process_time()
        n_rows = sum(len(t.train) + len(t.validation) for t in open_suite(config).tasks)
        readings.append(time.process_time() - begun)
        with tempfile.TemporaryDirectory() as cache:
            begun = time.process_time()
            tokens = open_tokens(config, tokenizer, BatchConfig(), GATED, cache=cache)
            builds.append(time.process_time() - begun)
            size = sum(file.stat().st_size for file in Path(cache).rglob("*.arrow"))
    n_tokens = sum(
        card.n_train * (card.mean_input_tokens + card.mean_target_tokens) for card in tokens.cards
    )
    reading, build = sorted(readings)[1], sorted(builds)[1]
    print(f"{n_rows:,} rows, {n_tokens / n_rows:.0f} tokens a row, {size / n_rows:.0f} bytes a row")
    print(f"reading and validating   {n_rows / reading:10,.0f} rows/s of CPU time")
    print(f"all, into the cache      {n_rows / build:10,.0f} rows/s of CPU time")
    print(f"10.6 million rows take {10.6e6 / n_rows * build / 60:.0f} minutes of one core")


if __name__ == "__main__":
    main()
