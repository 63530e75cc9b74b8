"""Following a page of the documentation: its files, commands and code, in their order."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from processes import ROOT, run

from mhr_scale.recipe import shipped

#: What they leave in their folder; the others print.
LEFT = {
    "pretrain": "adapter/adapter.safetensors",
    "average": "adapter/adapter.safetensors",
    "evaluate": "**/summary.json",
    "adapt": "summary.json",
    "analyse": "analysis.json",
    "export": "**/adapter_model.safetensors",
    "finetune": "adapter/adapter_model.safetensors",
    "convert": "mhr_scale.json",
    "report": "report.html",
}


#: Blocks of a page that are files: the paragraph before them names them.
FILES = ("yaml", "jsonl")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """The blocks of a language."""
    return [block for found, block in FENCE.findall(text) if found == language]


def commands_in(block: str) -> list[str]:
    """The command lines of a block."""
    return [line for line in block.splitlines() if line.strip()]


class Tour:
    """A folder in which commands of a page run, shortened by the overrides of their verb."""

    def __init__(self, folder: Path, shorter: Mapping[str, Sequence[str]]) -> None:
        self.folder = folder
        self.shorter = shorter

    def words_of(self, command: str) -> tuple[str, list[str], int]:
        """Of a command line: the verb, the words after it, and on how many ranks."""
        words = shlex.split(command)
        ranks = int(words[words.index("--num_gpus") + 1]) if "--num_gpus" in words else 0
        starts = [n for n, word in enumerate(words) if word.endswith(".py")]
        number = starts[0] if starts else words.index("mhr_scale") + 1
        verb = Path(words[number]).stem
        return verb, [*words[number + 1 :], *self.shorter.get(verb, ())], ranks

    def folder_of(self, subject: str, options: Sequence[str]) -> Path:
        """The folder a command writes to: as it says itself, or its recipe; of a run, the run's."""
        said = [option.removeprefix("run.folder=") for option in options if "run.folder=" in option]
        own = self.folder / subject
        if said or own.is_dir():
            return self.folder / (said or [subject])[0]
        file = own if own.is_file() else shipped.recipe(subject)
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        return self.folder / (recipe["run"]["folder"] if "run" in recipe else recipe["folder"])

    def check(self, command: str) -> None:
        """A command has left in its folder what it should."""
        verb, (subject, *options), _ = self.words_of(command)
        if verb in LEFT:
            found = list(self.folder_of(subject, options).glob(LEFT[verb]))
            assert found, command

    def run(self, command: str) -> str:
        """Run one command, in processes of its own; what it printed."""
        verb, words, ranks = self.words_of(command)
        result = run(f"launch/{verb}.py", *words, ranks=ranks, folder=self.folder)
        assert result.returncode == 0, f"{command}:\n{result.stdout[-3000:]}"
        self.check(command)
        return result.stdout

    def steps_of(self, page: str, text: str) -> list[list[str]]:
        """Write the files of a page; its commands and its code, as scripts with arguments."""
        steps = []
        for number, found in enumerate(FENCE.finditer(text)):
            language, block = found.groups()
            if language in FILES:
                (name, *_) = re.findall(rf"`([\w/]+\.{language})`", paragraph(text, found.start()))
                write(self.folder / name, block)
            elif language == "python":
                steps.append([str(write(self.folder / f"{page}_{number}.py", block))])
            elif language == "bash":
                for command in commands_in(block):
                    verb, words, _ = self.words_of(command)
                    steps.append([str(ROOT / "launch" / f"{verb}.py"), *words])
        return steps


def write(file: Path, text: str) -> Path:
    """A new file, in a folder that is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def paragraph(text: str, end: int) -> str:
    """The paragraph before a place in a text."""
    return text[:end].rstrip().rpartition("\n\n")[2]
