"""What the README says is so: its tree, its commands in their order, its examples."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from processes import ROOT, run, run_code

README = (ROOT / "README.md").read_text(encoding="utf-8")

#: What makes the commands short.
SHORTER = {
    "pretrain": (
        "schedule.steps=2",
        "batch={batch_size: 8, micro_batch_size: 4, max_input_tokens: 48, max_target_tokens: 32}",
        "tasks.train_examples=5",
        "tasks.validation_examples=1",
    ),
    "average": ("steps=[0, 2]",),
    "evaluate": ("scoring.examples=1",),
    "adapt": ("protocol.steps=2", "shots.seeds=[0]", "scoring.examples=1"),
    "analyse": ("alignment.tasks=2", "alignment.rows=1"),
    "finetune": ("protocol.steps=2", "scoring.examples=1"),
}
#: What they leave in their folder; the others print.
LEFT = {
    "pretrain": "adapter/adapter.safetensors",
    "average": "adapter/adapter.safetensors",
    "evaluate": "summary.json",
    "adapt": "summary.json",
    "analyse": "analysis.json",
    "export": "adapter_model.safetensors",
    "finetune": "adapter/adapter_model.safetensors",
    "convert": "mhr_scale.json",
    "report": "report.html",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def tree() -> set[str]:
    """Paths of the files under `mhr_scale/` that the README's tree names."""
    section = README.split("## The tree")[1].split("Thousands of damaged inputs")[0]
    found, folders = set(), [""]
    for line in section.splitlines():
        entry = re.match(r"^( +)(\S+)", line)
        if not entry:
            continue
        depth = (len(entry[1]) - 4) // 2
        folders = folders[: depth + 1]
        name = entry[2]
        if name.endswith("/"):
            folders.append(folders[-1] + name)
        else:
            found.add(folders[-1] + name)
    return found


def test_the_tree_in_the_readme_is_the_package() -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "mhr_scale").rglob("*.py")}
    plain = {name for name in files if not name.endswith("/__init__.py")}
    assert {name for name in tree() if name != "mhr_scale/__init__.py"} == plain


def folder_of(subject: str, options: list[str]) -> str:
    """The folder a command writes to: as it says itself, or its recipe; of a run, the run's."""
    said = [option.removeprefix("run.folder=") for option in options if "run.folder=" in option]
    if said or not subject.endswith(".yaml"):
        return (said or [subject])[0]
    recipe = yaml.safe_load((ROOT / subject).read_text(encoding="utf-8"))
    return str(recipe["run"]["folder"] if "run" in recipe else recipe["folder"])


def needs_data(command: str) -> bool:
    return "../shared" in command


class Tour:
    """The commands of the README, one after the other, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting = commands()

    def link_data(self, shared: Path) -> None:
        """Put the data where the commands look for it."""
        link = self.folder.parent / "shared"
        if not link.exists():
            link.symlink_to(shared.resolve())

    def follow(self, until: str) -> str:
        """Run all commands that have not run yet, up to this one; what this one printed.

        Without real data, those before it that need some are left out.
        """
        printed = ""
        while until in self.waiting:
            command = self.waiting.pop(0)
            if command == until or not needs_data(command):
                printed = self.run(command)
        return printed

    def run(self, command: str) -> str:
        """Run one command; what it printed."""
        words = shlex.split(command)
        number = next(number for number, word in enumerate(words) if word.endswith(".py"))
        script, subject, *options = words[number:]
        ranks = int(words[words.index("--num_gpus") + 1]) if "--num_gpus" in words else 0
        verb = Path(script).stem
        words = [subject, *options, *SHORTER.get(verb, ())]
        result = run(script, *words, ranks=ranks, folder=self.folder)
        assert result.returncode == 0, f"{command}:\n{result.stdout[-3000:]}"
        if verb in LEFT:
            assert (self.folder / folder_of(subject, options) / LEFT[verb]).is_file(), command
        return result.stdout


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    folder = tmp_path_factory.mktemp("readme") / "main"
    folder.mkdir()
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    return Tour(folder)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_readme_run(
    command: str, tour: Tour, request: pytest.FixtureRequest
) -> None:
    if needs_data(command):
        tour.link_data(request.getfixturevalue("shared"))
    assert tour.follow(command)


@pytest.mark.slow
def test_the_python_examples_of_the_readme_run(tmp_path: Path) -> None:
    examples = [code for code in blocks("python") if "mhr_scale import" in code]
    assert len(examples) == 3
    run_code("\n".join(examples), folder=tmp_path)
    assert (tmp_path / "averaged_adapter" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, flags=re.MULTILINE))
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
