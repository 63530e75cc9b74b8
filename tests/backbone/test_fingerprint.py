"""Logits stored with a backbone, and how every run compares itself with them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_t5 import HEAD, WO, small_t5, tensors_of, write_folder
from torch import nn

from mhr_scale.adapters import attach
from mhr_scale.backbone import fingerprint
from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.backbone.manifest import MANIFEST, Fingerprint
from mhr_scale.config import AdapterConfig, BackboneConfig, ConvertConfig, OriginConfig
from mhr_scale.engine.check_backbone import check_backbone
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError
from mhr_scale.families.t5 import GATED
from mhr_scale.verbs.convert import convert

pytestmark = pytest.mark.usefixtures("on_cpu")

K = "encoder.block.1.layer.0.SelfAttention.k.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder, in float32, of a backbone with a head of its own."""
    place = tmp_path_factory.mktemp("fingerprint")
    write_folder(place / "original", tensors_of(small_t5()))
    config = ConvertConfig(
        backbone=OriginConfig(name=str(place / "original")),
        dtype="float32",
        folder=str(place / "converted"),
    )
    return convert(config)


def opened(folder: Path, **settings: str) -> tuple[nn.Module, Blueprint, BackboneConfig, Engine]:
    """A backbone as a verb places it."""
    config = BackboneConfig(name=str(folder), **{"dtype": "float32", **settings})
    blueprint, engine = read_blueprint(config), Engine({}, timeout_seconds=60)
    return engine.build(config, blueprint), blueprint, config, engine


def stored(folder: Path) -> Fingerprint:
    manifest = read_blueprint(BackboneConfig(name=str(folder))).manifest
    assert manifest is not None
    return manifest.fingerprint


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bfloat16"}, {"quantise": "int8"}, {"dtype": "bfloat16", "quantise": "int8"}],
)
def test_a_right_backbone_passes(folder: Path, settings: dict[str, str]) -> None:
    check_backbone(*opened(folder, **settings))


def test_four_bits_of_a_right_backbone_pass(tmp_path: Path) -> None:
    config = ConvertConfig(
        backbone=OriginConfig(name="builtin:toy"), folder=str(tmp_path / "converted")
    )
    check_backbone(*opened(convert(config), quantise="nf4"))


def refused(folder: Path, change: Callable[[nn.Module], None], **settings: str) -> str:
    model, *rest = opened(folder, **settings)
    change(model)
    with pytest.raises(BackboneError) as caught:
        check_backbone(model, *rest)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def tie_head(model: nn.Module) -> None:
    """What a careless loader does to T0."""
    model.lm_head.weight = model.shared.weight  # type: ignore[union-attr]


def swap(model: nn.Module) -> None:
    """Two matrices of one shape in each other's place."""
    one = model.get_parameter(K)
    other = model.get_parameter(K.replace(".k.", ".v."))
    copy = one.data.clone()
    one.data.copy_(other.data)
    other.data.copy_(copy)


def lose(model: nn.Module) -> None:
    model.get_parameter(WO).data.zero_()


def poison(model: nn.Module) -> None:
    model.get_parameter(WO).data[0, 0] = math.nan


@pytest.mark.parametrize("change", [tie_head, swap, lose, poison])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_weights_are_noticed(
    folder: Path, change: Callable[[nn.Module], None], dtype: str
) -> None:
    text = refused(folder, change, dtype=dtype)
    assert text.startswith(f"{folder}: the backbone in {dtype}, replicated, does not give the")
    assert text.endswith("`mhr_scale convert RECIPE verify=true`")


def test_a_tied_head_is_noticed_in_eight_bits_too(folder: Path) -> None:
    assert "the backbone in int8" in refused(folder, tie_head, quantise="int8")


def test_adapters_are_off_while_the_backbone_is_compared(folder: Path) -> None:
    model, *rest = opened(folder)
    adapter = attach(model, AdapterConfig(n_skills=2), tasks=["a", "b"])
    for parameter in adapter.parameters():
        parameter.data.fill_(1.0)
    check_backbone(model, *rest)
    assert not any(linear.is_off for linear in adapter.linears)


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_that_trains_still_trains_after_the_check(folder: Path, mode: bool) -> None:
    model, *rest = opened(folder, dropout=None)  # type: ignore[arg-type]
    model.train(mode)
    check_backbone(model, *rest)
    assert model.training == mode


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"inputs": [[3], [10**18]]}, r"\.inputs: 10{18} is not in 0\.\."),
        ({"inputs": [[3, 4], []]}, r"\.inputs: a row without a token"),
        ({"inputs": []}, ": 0 inputs, targets of 4, 4 tokens"),
        ({"inputs": [], "targets": []}, r"\.inputs: a row without a token"),
        ({"targets": [[0, 3]]}, ": 2 inputs, targets of 2 tokens"),
        ({"targets": [[0], [3, 4]]}, ": 2 inputs, targets of 1, 2 tokens"),
        ({"targets": [[], []]}, r"\.targets: a row without a token"),
        ({"vocabulary": [-1]}, r"\.vocabulary: -1 is not in"),
        ({"vocabulary": []}, r"\.vocabulary: a row without a token"),
    ],
)
def test_a_damaged_question_is_refused(
    folder: Path, changes: dict[str, list[int]], expected: str
) -> None:
    _, blueprint, _, _ = opened(folder)
    with pytest.raises(BackboneError, match=rf"{MANIFEST}: fingerprint{expected}"):
        fingerprint.check_questions(replace(stored(folder), **changes), blueprint)


def test_a_folder_without_a_fingerprint_is_not_asked(folder: Path) -> None:
    model, blueprint, config, engine = opened(folder)
    tie_head(model)
    check_backbone(model, replace(blueprint, manifest=None), config, engine)


def test_the_checkpoint_is_read_without_building_the_model(folder: Path) -> None:
    blueprint = read_blueprint(BackboneConfig(name=str(folder)))
    assert fingerprint.ask_source(blueprint, stored(folder)).logits == stored(folder).logits


def test_the_bfloat16_tolerance_follows_the_backbones_own_rounding(folder: Path) -> None:
    noisy = replace(stored(folder), noise=0.1)
    assert fingerprint.tolerance_of(noisy, "bfloat16") == pytest.approx(0.5)
    assert fingerprint.tolerance_of(replace(noisy, noise=0.0), "bfloat16") == 0.02


def test_rounding_to_bfloat16_is_what_was_measured_at_conversion(folder: Path) -> None:
    model, *_ = opened(folder, dtype="bfloat16")
    found = fingerprint.ask(model, GATED, stored(folder), torch.device("cpu"))
    measured = fingerprint.difference(stored(folder), found)
    assert 0 < measured < 2 * stored(folder).noise


# -- questions and differences ---------------------------------------------------------------------


def questions(prompts: Sequence[Sequence[int]] = ()) -> Fingerprint:
    config = BackboneConfig(config={"vocab_size": 384, "num_layers": 1})
    return fingerprint.make_questions(read_blueprint(config), prompts)


def test_questions_are_the_same_every_time() -> None:
    assert questions() == questions()


def test_prompts_are_asked_as_they_are() -> None:
    asked = questions([[5, 6, 7], [8]])
    assert asked.inputs == [[5, 6, 7], [8]]
    assert len(asked.targets) == 2


def test_a_shorter_prompt_is_padded_and_masked() -> None:
    asked = questions([[5, 6, 7], [8]])
    alone = replace(asked, inputs=asked.inputs[1:], targets=asked.targets[1:])
    cpu = torch.device("cpu")
    found, expected = (fingerprint.ask(small_t5(), GATED, one, cpu) for one in (asked, alone))
    torch.testing.assert_close(torch.tensor(found.logits[1:]), torch.tensor(expected.logits))


def test_a_few_numbers_are_kept() -> None:
    asked = questions()
    kept = len(asked.vocabulary) * sum(map(len, asked.targets))
    assert (len(asked.vocabulary), kept) == (32, 256)
    assert max(asked.vocabulary) < 384


def answered(logits_BLV: torch.Tensor) -> Fingerprint:
    asked = questions()
    return fingerprint.answer(replace(asked, vocabulary=list(range(4))), logits_BLV)


def test_the_same_logits_make_no_difference() -> None:
    logits_BLV = torch.randn(2, 4, 4)
    assert fingerprint.difference(answered(logits_BLV), answered(logits_BLV)) == 0.0


def test_a_difference_is_a_share_of_the_spread_not_of_the_size() -> None:
    logits_BLV = 0.5 * torch.randn(2, 4, 4)
    other_BLV = logits_BLV.roll(1, dims=-1)
    plain = fingerprint.difference(answered(logits_BLV), answered(other_BLV))
    shifted = fingerprint.difference(answered(logits_BLV - 100), answered(other_BLV - 100))
    assert shifted == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_as_far_as_can_be(value: float) -> None:
    logits_BLV = torch.randn(2, 4, 4)
    other_BLV = logits_BLV.clone()
    other_BLV[0, 0, 0] = value
    assert fingerprint.difference(answered(logits_BLV), answered(other_BLV)) == math.inf


@pytest.mark.parametrize("name", ["logits", "norms"])
def test_a_fingerprint_without_its_numbers_is_as_far_as_can_be(folder: Path, name: str) -> None:
    text = json.loads((folder / MANIFEST).read_text())["fingerprint"]
    whole = Fingerprint(**text)
    assert fingerprint.difference(replace(whole, **{name: [[]]}), whole) == math.inf


def test_the_head_of_the_converted_folder_is_its_own(folder: Path) -> None:
    source = read_blueprint(BackboneConfig(name=str(folder))).source
    assert HEAD in source.names()
