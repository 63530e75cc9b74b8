"""A backbone over two ranks: who reads what, and that a wrong one is noticed."""

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
from causal_folders import write_causal
from processes import succeed, succeed_together
from safetensors.torch import load_file
from small_causal import FAMILIES
from small_t5 import small_t5, tensors_of, write_folder

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig, ConvertConfig, OriginConfig
from mhr_scale.verbs.convert import convert

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RIGHT = ("float32", "bfloat16", "replicated")
CONVERTED = "converted"
WRONG = ("tied", "tied bfloat16", "tied on one rank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("loading")
    origin = OriginConfig(name=str(write_folder(place / "original", tensors_of(small_t5()))))
    return convert(ConvertConfig(backbone=origin, dtype="float32", folder=str(place / "out")))


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    succeed("tests/distributed/programs/loading.py", str(folder), str(out), ranks=2)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_read_every_element_once_between_them(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    source = read_blueprint(BackboneConfig(name=str(folder))).source
    read: Counter[tuple[str, int]] = Counter()
    for rank in ranks:
        for name, start, stop in rank["reads"]:
            read.update((name, place) for place in range(start, stop))
    whole = {(name, n) for name in source.names() for n in range(prod(source.shape(name)))}
    assert read == Counter(whole)


def test_each_rank_reads_half_of_a_tensor(folder: Path, ranks: list[dict[str, Any]]) -> None:
    source = read_blueprint(BackboneConfig(name=str(folder))).source
    for rank in ranks:
        for name, start, stop in rank["reads"]:
            assert stop - start <= -(-prod(source.shape(name)) // 2), name


@pytest.mark.parametrize("what", RIGHT)
def test_the_right_backbone_passes_on_both_ranks(ranks: list[dict[str, Any]], what: str) -> None:
    assert [rank[what] for rank in ranks] == ["right", "right"]


@pytest.mark.parametrize("what", WRONG)
def test_a_wrongly_tied_head_is_refused_by_both_ranks(
    ranks: list[dict[str, Any]], what: str
) -> None:
    assert ranks[0][what] == ranks[1][what]
    assert "does not give the logits it was stored with" in ranks[0][what]


@pytest.fixture(scope="module")
def causal_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folders, out = (tmp_path_factory.mktemp(name) for name in ("causal", "causal_out"))
    for family in FAMILIES:
        write_causal(folders / family, family)
    origin = OriginConfig(name=str(folders / "mixtral"))
    config = ConvertConfig(backbone=origin, dtype="float32", folder=str(folders / CONVERTED))
    convert(config)
    succeed("tests/distributed/programs/causal_loading.py", str(folders), str(out), ranks=2)
    return [json.loads((out / f"causal{rank}.json").read_text()) for rank in range(2)]


def test_logits_of_every_causal_family_over_two_sharded_ranks_are_those_of_a_plain_load(
    causal_ranks: list[dict[str, Any]],
) -> None:
    """Also of one that was converted, whose stored logits both ranks have compared."""
    for found in causal_ranks:
        differences = {name: measured["difference"] for name, measured in found["float32"].items()}
        assert differences.keys() == {*FAMILIES, CONVERTED}
        assert {name: size for name, size in differences.items() if not size < 1e-5} == {}


def test_sharded_and_recomputed_gradients_are_the_replicated_ones_bit_for_bit(
    causal_ranks: list[dict[str, Any]],
) -> None:
    for found in causal_ranks:
        assert set(found["same gradients"].values()) == {True}


def test_buffers_of_a_sharded_backbone_are_those_that_transformers_loads(
    causal_ranks: list[dict[str, Any]],
) -> None:
    for found in causal_ranks:
        for measured in (found["float32"], found["bfloat16"]):
            assert {name for name, of in measured.items() if not of["same buffers"]} == set()


def test_a_run_over_a_converted_and_sharded_backbone_is_the_run_over_the_original(
    tmp_path: Path,
) -> None:
    """Float32 holds the original's bfloat16, so adapters have to be equal bit for bit."""
    origin = OriginConfig(name="builtin:toy")
    config = ConvertConfig(backbone=origin, dtype="float32", folder=str(tmp_path / "converted"))
    settings = ["schedule.steps=2", "batch.batch_size=8", "batch.micro_batch_size=4"]
    settings += ["backbone.dtype=float32", "run.save_every=0", "tasks.validation_examples=1"]
    settings += ["run.ds_config=ds_configs/cpu.json"]
    backbones = {"converted": str(convert(config)), "original": "builtin:toy"}
    start = ("launch/pretrain.py", "launch/recipes/toy.yaml", *settings)
    output = succeed_together(
        [
            (*start, f"backbone.name={backbone}", f"run.folder={tmp_path / 'runs' / name}")
            for name, backbone in backbones.items()
        ],
        tmp_path,
    )
    assert output.count("its stored logits to") == 1
    converted, original = (
        load_file(tmp_path / "runs" / name / "adapter" / "adapter.safetensors")
        for name in backbones
    )
    assert converted.keys() == original.keys()
    assert all(converted[name].equal(original[name]) for name in original)
