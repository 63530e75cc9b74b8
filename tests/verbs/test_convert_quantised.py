"""`convert` with `quantise`: what is written, who opens it, and that the bits are the same."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversions import manifest_of, run_convert
from small_t5 import CARD, small_t5, stored, tensors_of, write_folder
from torch import Tensor

from mhr_scale.backbone import quantise
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.identity import identify
from mhr_scale.backbone.of_adapter import backbone_facts
from mhr_scale.backbone.quantised_parts import keep_format
from mhr_scale.backbone.weights import read_whole
from mhr_scale.config import BackboneConfig, precision_of
from mhr_scale.engine.check_backbone import check_backbone
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError, EngineError, UserError
from mhr_scale.exchange import stock
from mhr_scale.planning.sizes import read_sizes

KINDS = ("int8", "nf4")
WIDE = {"d_model": 64, "d_kv": 32, "d_ff": 128}
Q = "encoder.block.0.layer.0.SelfAttention.q"
WO = "encoder.block.0.layer.1.DenseReluDense.wo"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32."""
    place = tmp_path_factory.mktemp("quantised") / "source"
    torch.manual_seed(1)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**CARD, **WIDE}))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return write_folder(place, tensors_of(model), card={**CARD, **WIDE})


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    return run_convert(source, source.parent / "plain")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, source: Path) -> Path:
    """It, converted and quantised, in several files."""
    settings = {"quantise": request.param, "max_shard_bytes": 60_000}
    return run_convert(source, source.parent / request.param, **settings)


def build(folder: Path, **settings: Any) -> Any:
    config = BackboneConfig(name=str(folder), **settings)
    return Engine({}, timeout_seconds=60, device=CPU).build(config, read_blueprint(config))


def logits(model: Any) -> Tensor:
    x = torch.arange(3, 12).reshape(1, 9)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=x, decoder_input_ids=x).logits
    return found


def is_in_file(tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor lies in one of the maps of the folder's files, which the system lists."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return str(folder) in line
    return False


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dtype": "float32"}, {"mapped": False}])
def test_a_stored_backbone_is_the_one_that_is_quantised_at_the_start(
    folder: Path, plain: Path, settings: dict[str, Any]
) -> None:
    now = build(plain, quantise=folder.name, **settings)
    for recipe in ({}, {"quantise": folder.name}):
        assert torch.equal(logits(build(folder, **settings, **recipe)), logits(now))


def test_stock_transformers_opens_the_folder_and_computes_the_same(folder: Path) -> None:
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    keep_format(model)
    unfused = {"fused_attention": False, "fused_gate": False, "fused_norm": False}
    assert torch.equal(logits(model), logits(build(folder, **unfused)))


def test_it_is_what_transformers_writes_and_what_that_writes_is_read(
    folder: Path, plain: Path, tmp_path: Path
) -> None:
    config = BackboneConfig(name=str(plain), quantise=folder.name)  # type: ignore[arg-type]
    model = stock.load_backbone(config, read_blueprint(config), CPU)
    model.save_pretrained(tmp_path / "theirs")
    found, expected = stored(folder), stored(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = tensor.numel()  # of nf4, one part is a text with blanks at its end
        assert torch.equal(found[name].flatten()[:size], tensor.flatten())
    assert torch.equal(logits(build(tmp_path / "theirs")), logits(build(folder)))


def test_finetune_opens_it_as_it_is(folder: Path) -> None:
    expected = logits(build(folder, fused_attention=False, fused_gate=False, fused_norm=False))
    for kind in ("none", folder.name):
        config = BackboneConfig(name=str(folder), quantise=kind)  # type: ignore[arg-type]
        assert torch.equal(
            logits(stock.load_backbone(config, read_blueprint(config), CPU)), expected
        )


# -- opening ---------------------------------------------------------------------------------------


def test_every_number_lies_in_the_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mhr_scale")
    model = build(folder)
    logits(model)
    assert not [n for n, p in model.named_parameters() if not is_in_file(p, folder)]
    assert is_in_file(scales_of(model.get_submodule(Q)), folder)
    told = [text for text in caplog.messages if text.startswith("backbone: ")]
    assert len(told) == 1
    assert told[0].endswith("kB mapped, which this machine holds once in its file cache")


def scales_of(linear: Any) -> Tensor:
    found: Tensor = linear.state.SCB if hasattr(linear, "state") else linear.quant_state.absmax
    return found


def test_copies_are_made_where_they_are_asked_for(folder: Path) -> None:
    model = build(folder, mapped=False)
    assert not [n for n, p in model.named_parameters() if is_in_file(p, folder)]
    assert not is_in_file(model.get_submodule(Q).weight, folder)


def test_wo_and_what_is_outside_the_blocks_stay_whole(folder: Path) -> None:
    tensors = stored(folder)
    assert tensors[f"{Q}.weight"].dtype == (torch.int8 if folder.name == "int8" else torch.uint8)
    assert {tensors[name].dtype for name in (f"{WO}.weight", "lm_head.weight")} == {torch.bfloat16}


def test_the_blueprint_has_whole_weights_by_the_models_names(folder: Path, plain: Path) -> None:
    found, whole = (read_blueprint(BackboneConfig(name=str(one))) for one in (folder, plain))
    assert found.source.names() == whole.source.names()
    for name in found.source.names():
        assert found.source.shape(name) == whole.source.shape(name)
    weight, expected = (read_whole(one.source, f"{Q}.weight").float() for one in (found, whole))
    assert (
        0 < (weight - expected).norm() / expected.norm() < (0.02 if folder.name == "int8" else 0.2)
    )
    assert identify(found) != identify(whole)


def test_cards_say_the_true_precision(folder: Path) -> None:
    config = BackboneConfig(name=str(folder))
    facts = backbone_facts(config, read_blueprint(config))
    assert precision_of(facts) == f"{folder.name} and bfloat16"


def test_a_plan_reads_its_sizes(folder: Path, plain: Path) -> None:
    one, other = (read_sizes(BackboneConfig(name=str(place))) for place in (folder, plain))
    assert one.source.names() == other.source.names()


# -- the fingerprint -------------------------------------------------------------------------------


def test_the_distance_is_kept_and_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_of(folder)
    kept = manifest["fingerprint"]
    assert (manifest["quantise"], manifest["dtype"]) == (folder.name, "bfloat16")
    assert 1e-3 < kept["noise"] < 0.05
    assert 1e-3 < kept["distance"] < (0.05 if folder.name == "int8" else 0.5)
    run_convert(folder.parent / "source", folder.parent / "told", quantise=folder.name)
    shutil.rmtree(folder.parent / "told")
    percent = f"{100 * kept['distance']:.2g}"
    assert f"in {folder.name} its logits differ from bfloat16's by {percent} % of their spread" in (
        capfd.readouterr().out
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_start_checks_the_stored_logits_and_finds_a_wrong_weight(
    folder: Path, dtype: str
) -> None:
    config = BackboneConfig(name=str(folder), dtype=dtype)  # type: ignore[arg-type]
    engine, blueprint = Engine({}, timeout_seconds=60, device=CPU), read_blueprint(config)
    model: Any = engine.build(config, blueprint)
    check_backbone(model, blueprint, config, engine)
    for name, linear in model.named_modules():
        if type(linear).__name__ in ("Linear8bitLt", "Linear4bit") and "DenseReluDense" not in name:
            scales_of(linear).zero_()
    with pytest.raises(BackboneError, match=rf"the backbone in {folder.name}, replicated, does"):
        check_backbone(model, blueprint, config, engine)


def test_it_can_be_verified(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_convert(folder.parent / "source", folder, verify=True)
    assert "files as they were written, logits exactly" in capfd.readouterr().out


# -- at the door -----------------------------------------------------------------------------------


def test_another_kind_or_shards_are_refused_with_the_way_out(folder: Path) -> None:
    other = "nf4" if folder.name == "int8" else "int8"
    config = BackboneConfig(name=str(folder), quantise=other)  # type: ignore[arg-type]
    blueprint = read_blueprint(config)
    with pytest.raises(BackboneError, match=rf"{other}, and .* holds {folder.name} weights; leave"):
        quantise.check(config, blueprint)
    same = replace(config, quantise="none")
    quantise.check(same, blueprint)
    with pytest.raises(EngineError, match=r"zero3.json shards them; .* name a folder of whole"):
        quantise.check(same, blueprint, ds_config="zero3.json")


def test_a_quantised_folder_is_not_converted_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=rf"holds {folder.name} weights; convert what they"):
        run_convert(folder, tmp_path / "again")


def test_widths_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    odd = write_folder(tmp_path / "odd", tensors_of(small_t5()))
    with pytest.raises(BackboneError, match=r"^quantise: nf4 takes rows .* use int8"):
        run_convert(odd, tmp_path / "out", quantise="nf4")
    assert not (tmp_path / "out").exists()
    folder = run_convert(odd, tmp_path / "out", quantise="int8", dtype="float32")
    assert logits(build(folder)).isfinite().all()


def test_numbers_beyond_float16_are_refused_in_8_bits(tmp_path: Path) -> None:
    tensors = tensors_of(small_t5())
    tensors[f"{Q}.weight"][0, 0] = 1e5
    source = write_folder(tmp_path / "source", tensors)
    with pytest.raises(BackboneError, match=rf"{Q}.weight has numbers that float16 cannot hold"):
        run_convert(source, tmp_path / "out", quantise="int8")


@pytest.mark.parametrize("change", ["config", "part", "manifest"])
def test_a_changed_folder_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / ("mhr_scale.json" if change == "manifest" else "config.json")
    content = json.loads(file.read_text())
    if change == "manifest":
        content["quantise"] = "none"
    else:
        del content["quantization_config"]
    if change == "part":  # without a manifest, as somebody else's
        (copy / "mhr_scale.json").unlink()
    file.write_text(json.dumps(content))
    if change == "config":
        manifest = json.loads((copy / "mhr_scale.json").read_text())
        manifest["files"]["config.json"]["bytes"] = file.stat().st_size
        (copy / "mhr_scale.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"no weight's data type|says quantise none, weights"):
        read_blueprint(BackboneConfig(name=str(copy)))
