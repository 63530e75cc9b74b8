"""What the README says is so: its tree, its commands in their order, its examples."""

import re
from pathlib import Path

import pytest
from processes import ROOT, run_code
from tours import Tour, blocks, commands_in

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = commands_in("".join(blocks(README, "bash")))

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


def needs_data(command: str) -> bool:
    return "../shared" in command


class ReadmeTour(Tour):
    """The commands of the README, one after the other, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SHORTER)
        self.waiting = list(COMMANDS)

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


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> ReadmeTour:
    folder = tmp_path_factory.mktemp("readme") / "main"
    folder.mkdir()
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    return ReadmeTour(folder)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_run(
    command: str, tour: ReadmeTour, request: pytest.FixtureRequest
) -> None:
    if needs_data(command):
        tour.link_data(request.getfixturevalue("shared"))
    assert tour.follow(command)


@pytest.mark.slow
def test_the_python_examples_of_the_readme_run(tmp_path: Path) -> None:
    examples = [code for code in blocks(README, "python") if "mhr_scale import" in code]
    assert len(examples) == 3
    run_code("\n".join(examples), folder=tmp_path)
    assert (tmp_path / "averaged_adapter" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, flags=re.MULTILINE))
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
