"""Two launches at once never mix: the short form of `concurrent_launches.py`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from concurrent_launches import CASES, pair
from processes import free_port, succeed

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was alone."""
    folder = tmp_path_factory.mktemp("concurrent") / "run"
    succeed(CASES["pretrain"].script, *CASES["pretrain"].arguments(folder, folder))
    return folder


def test_of_two_runs_in_one_folder_one_is_right_and_one_is_refused(
    whole: Path, tmp_path: Path
) -> None:
    case = CASES["pretrain"]
    assert pair(case, whole, tmp_path / "run", whole, ranks=1, wait=0.5) == []


def test_of_two_launches_at_one_port_one_is_right_and_one_is_refused(
    whole: Path, tmp_path: Path
) -> None:
    case = CASES["pretrain"]
    found = pair(case, whole, tmp_path / "run", whole, ranks=2, wait=1.0, port=free_port())
    assert found == []
