"""The Dockerfile: it names what it starts from, and copies what there is and no more."""

import re

from processes import ROOT

from mhr_scale.recipe import shipped

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")


def test_the_image_starts_from_a_pinned_cuda_line_that_its_head_names() -> None:
    (base,) = re.findall(r"^FROM (\S+)$", TEXT, flags=re.MULTILINE)
    line, named = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu\d+\.\d+", base), TEXT
    assert line is not None
    assert f"CUDA {line[1]}, " in named.splitlines()[0]
    assert "latest" not in TEXT


def test_it_copies_what_the_checkout_has_and_the_context_holds() -> None:
    copied = [
        word
        for words in re.findall(r"^COPY (.*) \S+$", TEXT, flags=re.MULTILINE)
        for word in words.split()
    ]
    assert {"pyproject.toml", "mhr_scale", "launch/recipes", "ds_configs"} <= set(copied)
    assert IGNORED[1] == "*"
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in IGNORED, name


def test_its_example_names_a_shipped_recipe() -> None:
    (name,) = re.findall(r"mhr_scale pretrain (\S+)", TEXT)
    assert shipped.recipe(name)
