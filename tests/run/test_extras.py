"""Extras: what the table in the package says of them is what installers read."""

import re
import tomllib

import pytest
from processes import ROOT

from mhr_scale.errors import ConfigError
from mhr_scale.run import extras

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_module_of_the_table_is_a_requirement_of_its_extra() -> None:
    made: dict[str, set[str]] = {}
    for module, extra in extras.EXTRAS.items():
        made.setdefault(extra, set()).add(module)
    listed = {
        extra: {
            re.split(r"[^\w-]", need)[0].removesuffix("-skinny").replace("-", "_") for need in needs
        }
        for extra, needs in PROJECT["optional-dependencies"].items()
        if extra != "dev"
    }
    assert made == listed


@pytest.mark.parametrize("module", extras.EXTRAS)
def test_a_missing_package_is_one_line_with_the_way_to_have_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigError) as caught:
        extras.check(module, what="run.x", way_out=", or leave it out")
    assert str(caught.value) == (
        f"run.x: '{module}' is not installed; "
        f'pip install "mhr_scale[{extras.EXTRAS[module]}]", or leave it out'
    )
