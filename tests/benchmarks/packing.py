"""Useful tokens a second on real mixtures: rows laid flat, length buckets, and PEFT's Trainer.

python tests/benchmarks/packing.py --part t5-t0 --micro 8 --shared FOLDER [--json FILE]
    a step of MHR (8 skills, 8 splits, rank 1) over packed rows and over length buckets, of the
    frozen backbone alone in both forms, and of stock PEFT LoRA under the Hugging Face Trainer

FOLDER has data/t0_open_sample, data/superni_sample, and tokenizers in backbones. Rows are drawn
from the mixture as `pretrain` draws them. A useful token is one of an input or of a target; padding
is none. All ways train on the same global batches and take turns, in an order that is reversed
every other time; figures are medians over the turns, ratios medians over the ratios of a turn,
where a Trainer that groups rows by length has other rows in a turn than the others.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packing_ways import Bench, Done, Frozen, Ours, Way, WithTrainer
from step_time import RESULTS, machine
from step_time_causal import CAUSAL_SHAPES, LLAMA
from step_time_ways import SHAPES, SMALL, Setting

from mhr_scale.config import PretrainConfig
from mhr_scale.recipe.reading import load
from mhr_scale.run.runlog import Progress, start_logging

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
T5_FIELDS = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LLAMA_FIELDS = {
    "model_type": "llama",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
#: Backbones by name, and the folder of a tokenizer whose ids they have.
BACKBONES = {
    "t5": ({**SMALL, "vocab_size": 32128, **T5_FIELDS}, "backbones/t5_mini_text"),
    "llama": ({**LLAMA, **LLAMA_FIELDS}, "backbones/smollm2_135m"),
}
TINY_BACKBONES = {
    "t5": ({**SHAPES["tiny"], **T5_FIELDS, "vocab_size": 384, "num_heads": 4}, None),
    "llama": (
        {**CAUSAL_SHAPES["llama-tiny"], **LLAMA_FIELDS, "num_hidden_layers": 1, "eos_token_id": 1},
        None,
    ),
}
#: Recipes by mixture, and the folder of their rows.
MIXTURES = {
    "t0": ("t0_open_tiny.yaml", "data/t0_open_sample"),
    "superni": ("superni_tiny.yaml", "data/superni_sample"),
}
PARTS = tuple(f"{backbone}-{mixture}" for backbone in BACKBONES for mixture in MIXTURES)
#: Ways whose tokens/s others are compared with, in the same turn.
BASES = ("MHR, buckets", "PEFT, Trainer")
Row = dict[str, Any]
#: Seconds of the process, of the clock, and what was done.
Turn = tuple[float, float, Done]


def main(arguments: Sequence[str] | None = None) -> Row:
    """Measure the parts asked for, print their tables, and return what the JSON file gets."""
    args = parse(arguments)
    start_logging()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|bitsandbytes|accelerate)\b")
    torch.set_num_threads(args.threads)
    found: Row = {}
    for part in args.part:
        setting = Setting(dtype=getattr(torch, args.dtype))
        entry = {"machine": machine(setting), "sizes": sizes(args), "rows": measure(args, part)}
        entry["machine"]["load_after"] = os.getloadavg()
        found[part] = entry
        print(to_markdown(part, entry["rows"]), flush=True)
        if args.json:
            keep(Path(args.json), part, entry)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=[*PARTS], help="backbone and mixture (all)")
    add("--shared", help="folder of rows and tokenizers; without it the toy suite, in bytes")
    add("--micro", nargs="+", type=int, default=[4, 8, 16], help="rows of micro batches (4 8 16)")
    add("--larger", nargs="*", type=int, default=[], help="more sizes, for packed rows alone")
    add("--batch", type=int, default=64, help="rows of a global batch (64)")
    add("--tokens", type=int, default=256, help="inputs are cut here (256)")
    add("--targets", type=int, default=64, help="targets are cut here (64)")
    add("--turns", type=int, default=4, help="timed steps of each way, behind one that is not (4)")
    add("--rank", type=int, default=1, help="PEFT's rank; 8 trains as many numbers as MHR (1)")
    add("--no-peft", action="store_true", help="without the Trainer")
    add("--no-frozen", action="store_true", help="without the backbone alone")
    add("--by-length", action="store_true", help="also the Trainer grouping rows by length")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    add("--threads", type=int, default=1, help="threads (1)")
    add("--tiny", action="store_true", help="smallest backbones: does it run at all?")
    add("--json", help=f"keep the figures here too (say {RESULTS.name}/packing_cpu.json)")
    return parser.parse_args(arguments)


def sizes(args: argparse.Namespace) -> Row:
    """What the figures of a part depend on."""
    names = ("batch", "tokens", "targets", "turns", "rank", "dtype", "threads")
    return {name: getattr(args, name) for name in names}


def recipe(args: argparse.Namespace, part: str) -> PretrainConfig:
    """The recipe of a mixture over another backbone and in other lengths."""
    backbone, mixture = part.split("-")
    fields, tokenizer = (TINY_BACKBONES if args.tiny else BACKBONES)[backbone]
    name, folder = MIXTURES[mixture]
    if args.shared is None:
        name, tokenizer = "toy.yaml", None
    own = "byt5" if tokenizer is None else str(Path(args.shared, tokenizer))
    settings = [
        "backbone.name=null",
        f"backbone.config={json.dumps(fields)}",
        f"backbone.tokenizer={own}",
        f"backbone.dtype={args.dtype}",
        *("adapter.layout=full", "adapter.rank=1", "adapter.n_skills=8", "adapter.n_splits=8"),
        f"batch.batch_size={args.batch}",
        f"batch.micro_batch_size={args.batch}",
        f"batch.max_input_tokens={args.tokens}",
        f"batch.max_target_tokens={args.targets}",
    ]
    if args.shared is not None:
        settings += [f"tasks.folder={Path(args.shared, folder)}", "run.token_cache=null"]
    return load(PretrainConfig, RECIPES / name, settings)


# -- times -----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, part: str) -> list[Row]:
    """All ways over one backbone and mixture, micro batch size by size."""
    with Bench.open(recipe(args, part)) as bench:
        stock = None if args.no_peft else bench.stock_model()
        rows = []
        for micro in args.micro:
            made = ways(args, bench, stock, micro)
            times = take_turns(made, args.turns, f"{part}, micro batches of {micro}")
            bases = {
                way.name: times[number]
                for number, way in enumerate(made)
                if way.name in BASES and way.micro == micro
            }
            rows += [
                {"beside": micro, **figures(way, own, bases)}
                for way, own in zip(made, times, strict=True)
            ]
            check_losses(
                {
                    f"{way.name}, {way.micro}": loss
                    for way, own in zip(made, times, strict=True)
                    if (loss := own[0][2].loss or getattr(way, "first_loss", None)) is not None
                }
            )
    return rows


def ways(args: argparse.Namespace, bench: Bench, stock: Any, micro: int) -> list[Way]:
    """Every way at one size; larger packed micro batches beside the largest one."""
    made: list[Way] = []
    if not args.no_frozen:
        made += [Frozen(bench, micro, packing=packing) for packing in (False, True)]
    made += [Ours(bench, micro, packing=packing) for packing in (False, True)]
    if micro == max(args.micro):
        made += [Ours(bench, larger, packing=True) for larger in args.larger]
    for by_length in (False, True)[: 1 + args.by_length]:
        if stock is not None:
            n_steps = args.turns + 2  # the first is not timed, and none may be the last
            options = {"n_steps": n_steps, "rank": args.rank, "by_length": by_length}
            made.append(WithTrainer(bench, stock, micro, **options))
    return made


def take_turns(made: Sequence[Way], turns: int, what: str) -> list[list[Turn]]:
    """Steps of all ways in turns; those of turn 0 are warm-up."""
    progress = Progress(len(made) * (turns + 1), start=0, what=what, unit="step")
    times: list[list[Turn]] = [[] for _ in made]
    try:
        for turn in range(turns + 1):
            for number in range(len(made))[:: -1 if turn % 2 else 1]:
                way = made[number]
                gc.collect()
                with way.ready():
                    cpu, wall = time.process_time(), time.perf_counter()
                    done = way.step()
                    seconds = time.process_time() - cpu, time.perf_counter() - wall
                times[number].append((*seconds, done))
                progress.advance(f"{way.name}, {way.micro} rows")
    finally:
        for way in made:
            way.close()
    progress.close()
    return times


def figures(way: Way, own: Sequence[Turn], bases: Mapping[str, Sequence[Turn]]) -> Row:
    """Useful tokens a second of CPU time and of the clock, padding's share, ratios to the bases."""
    timed = own[1:]
    padding = statistics.fmean(done.padding_share for *_, done in own)
    row: Row = {"way": way.name, "micro": way.micro, "padding": padding}
    for clock, name in enumerate(("cpu", "wall")):
        rates = [turn[2].tokens / turn[clock] for turn in timed]
        row[f"{name}_tokens_per_second"] = statistics.median(rates)
        row[f"{name}_ratios"] = {
            base: statistics.median(
                rate * theirs[clock] / theirs[2].tokens
                for rate, theirs in zip(rates, turns[1:], strict=True)
            )
            for base, turns in bases.items()
        }
    return row


def check_losses(losses: Mapping[str, float]) -> None:
    """A first step has the same loss in all ways: adapters begin at zero.

    Not quite of a Trainer of T5, which means the means of its micro batches.
    """
    expected = next(iter(losses.values()))
    for name, loss in losses.items():
        tolerance = 0.1 if name.startswith("PEFT") else 0.01
        assert abs(loss / expected - 1.0) < tolerance, losses


def keep(file: Path, part: str, entry: Row) -> None:
    """Add a part to the file; other micro batches of that part stay."""
    whole: Row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for size in dict.fromkeys(row["beside"] for row in entry["rows"]):
        rows = [row for row in entry["rows"] if row["beside"] == size]
        whole.setdefault(part, {})[f"micro {size}"] = entry | {"rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def to_markdown(part: str, rows: Sequence[Row]) -> str:
    """A table."""
    heads = ["way", "rows", "tokens/s of CPU", "by the clock", "padding"]
    lines = [f"{part}:", "", f"| {' | '.join([*heads, *(f'x {base}' for base in BASES)])} |"]
    lines.append("|---" * (len(heads) + len(BASES)) + "|")
    for row in rows:
        ratios = [row["cpu_ratios"].get(base) for base in BASES]
        cells = [
            *(row["way"], str(row["micro"])),
            *(f"{row[f'{clock}_tokens_per_second']:,.0f}" for clock in ("cpu", "wall")),
            f"{100 * row['padding']:.1f} %",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
