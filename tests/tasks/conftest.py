"""Fixtures of the tasks' tests."""

import pytest


@pytest.fixture
def templates(shared):
    folder = shared / "data" / "promptsource_templates" / "templates"
    if not folder.is_dir():
        pytest.skip(f"no templates in {folder}")
    return str(folder)
