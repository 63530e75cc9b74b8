"""Runs and saves killed at random moments lose nothing: the short form of `kills.py`."""

import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from killed_saves import SCENES, Scene, kill_everywhere
from kills import Reference, kill_run, make_references

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SEED = 7
KILLS = 2


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.mark.parametrize("scene", [s for s in SCENES if s.keep == 1], ids=lambda scene: scene.name)
def test_a_save_killed_at_any_point_leaves_a_state_to_go_on_from(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # a kill loses nothing it had written
    found = list(kill_everywhere(scene, tmp_path))
    assert len(found) > 50
    assert [(point, faults) for point, faults in found if faults] == []


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Runs that nobody kills."""
    return make_references(tmp_path_factory.mktemp("kills"), ("pretrain", "adapt"))


@pytest.mark.parametrize(("verb", "ranks"), [("pretrain", (1, 2, 1)), ("adapt", (1,))])
def test_a_run_killed_twice_ends_as_one_that_nobody_has_killed(
    references: dict[str, Reference], tmp_path: Path, verb: str, ranks: tuple[int, ...]
) -> None:
    draw = random.Random(f"{SEED} {verb}")
    folder = tmp_path / "run"
    run = kill_run(references[verb], folder, kills=KILLS, ranks=cycle(ranks), draw=draw)
    assert (run.faults, len(run.kills)) == ([], KILLS), f"seed {SEED}: {run.kills}"
