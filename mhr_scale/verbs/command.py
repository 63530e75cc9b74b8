"""The command `mhr_scale VERB ...`: which verbs there are, and the one way into each of them.

The script of an installation, `python -m mhr_scale`, `deepspeed --module mhr_scale` and the stubs
in `launch/` of a checkout all come here. A verb is imported when its recipe has been read.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn

from mhr_scale.errors import ConfigError, did_you_mean
from mhr_scale.run import streams
from mhr_scale.run.runlog import rank
from mhr_scale.verbs.launching import guarded, imported, later, main, main_of_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """A verb: what it does in one line, its function, and how it is called.

    `function` is `module:function` in this room. `schema` is the type of its recipe in
    `mhr_scale.config`; a verb without one reads the words of the command line itself. `has_ranks`:
    several processes share its work. `has_tables`: it prints tables as `--format` says.
    """

    line: str
    function: str
    schema: str | None = None
    has_ranks: bool = False
    has_tables: bool = False


VERBS = {
    "pretrain": Verb(
        line="train an adapter on many tasks at once",
        function="pretrain:pretrain",
        schema="PretrainConfig",
        has_ranks=True,
    ),
    "average": Verb(
        line="average an inventory, with extra steps on its training mixture if asked for",
        function="average:average",
        schema="AverageConfig",
        has_ranks=True,
    ),
    "evaluate": Verb(
        line="score a backbone, with or without an adapter, on tasks",
        function="evaluate:evaluate",
        schema="EvaluateConfig",
        has_ranks=True,
        has_tables=True,
    ),
    "adapt": Verb(
        line="adapt to many few-shot tasks at once: an adapter per task, seed and variant",
        function="adapt:adapt",
        schema="AdaptConfig",
        has_ranks=True,
        has_tables=True,
    ),
    "export": Verb(
        line="export an adapter to PEFT or into the backbone's weights, or import one",
        function="export:export",
        schema="ExportConfig",
    ),
    "finetune": Verb(
        line="fine-tune an exported LoRA on one task, over a backbone in 4, 8 or 16 bits",
        function="finetune:finetune",
        schema="FinetuneConfig",
    ),
    "convert": Verb(
        line="convert a checkpoint into safetensors that every run opens fast and checked",
        function="convert:convert",
        schema="ConvertConfig",
    ),
    "analyse": Verb(
        line="look at what an adapter has learned: alignment, routing, inventory",
        function="analyse:analyse",
        schema="AnalyseConfig",
        has_ranks=True,
        has_tables=True,
    ),
    "data": Verb(
        line="check the tasks of a recipe of pretrain, and fill its token cache",
        function="data:check_data",
        schema="PretrainConfig",
        has_tables=True,
    ),
    "plan": Verb(
        line="say what a recipe would take on some machines, and which placement to use",
        function="plan:plan",
        has_tables=True,
    ),
    "summarise": Verb(
        line="print the tables of evaluations again, and of several seeds their aggregates",
        function="summarise:summarise_runs",
        has_tables=True,
    ),
    "report": Verb(
        line="write one HTML file about runs of any kind, with pictures and tables",
        function="report:report",
    ),
    "harness": Verb(
        line="run lm-evaluation-harness, which then knows the model mhr_scale",
        function="harness:run_harness",
    ),
    "recipes": Verb(
        line="list the recipes that come with the package, or copy one",
        function="recipes:recipes",
    ),
}


def command() -> NoReturn:
    """Do what the words of the process's command line ask for, and end it."""
    words = sys.argv[1:]
    if words and words[0].startswith("--local_rank"):  # the launcher's; ranks have RANK
        words = words[1:]
    if words and words[0] in VERBS:
        run(words[0], words[1:])
    guarded(lambda: _answer(words))


def run(name: str, words: Sequence[str] | None = None) -> NoReturn:
    """Run a verb on these words, by default those of the command line, and end the process."""
    verb, given = VERBS[name], sys.argv[1:] if words is None else words
    if verb.schema is None:
        main_of_words(later(verb.function), words=given, has_tables=verb.has_tables)
    with imported():
        schema = getattr(import_module("mhr_scale.config"), verb.schema)
    about = about_verb(name)
    main(schema, later(verb.function), about=about, words=given, has_tables=verb.has_tables)


def about_verb(name: str) -> str:
    """What a verb with a recipe does, and how it is called."""
    verb = VERBS[name]
    calls = [(f"mhr_scale {name} RECIPE [a.b=value ...] [--print]", "one process")]
    if verb.has_ranks:
        launcher = "deepspeed --num_gpus N --module"
        calls.append((f"{launcher} mhr_scale {name} RECIPE [a.b=value ...]", "N processes"))
    width = max(len(call) for call, _ in calls)
    lines = [f"{verb.line[0].upper()}{verb.line[1:]}.", ""]
    lines += [f"{call:{width}}    {ranks}" for call, ranks in calls]
    lines += ["", f"In a checkout, launch/{name}.py stands for it under python and deepspeed."]
    if verb.has_tables:
        lines += ["", "--format text, markdown, csv or latex: how tables are printed."]
    return "\n".join(lines)


def about_command() -> str:
    """How to call the command, and a line on every verb."""
    width = max(map(len, VERBS))
    lines = ["mhr_scale VERB ...", "deepspeed --num_gpus N --module mhr_scale VERB ...", ""]
    lines += [f"    {name:{width}}  {verb.line}" for name, verb in VERBS.items()]
    lines += ["", "mhr_scale VERB --help says what a verb reads: a recipe and its settings."]
    lines += ["mhr_scale --version says which version this is."]
    return "\n".join(lines) + "\n"


def _answer(words: Sequence[str]) -> None:
    """Print the help page or the version; raises `ConfigError` for words that name no verb."""
    if not words:
        raise ConfigError(f"no verb given; one of {', '.join(VERBS)}; --help says what they do")
    if words == ["--version"]:
        if rank() == 0:
            streams.write_result(f"mhr_scale {version('mhr_scale')}\n")
        return
    if not {"--help", "-h"} & set(words):
        hint = did_you_mean(words[0], VERBS) or f"; one of {', '.join(VERBS)}"
        raise ConfigError(f"unknown verb '{words[0]}'{hint}")
    if rank() == 0:
        streams.write_result(about_command())
