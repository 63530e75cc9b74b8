"""Decoder-only backbones are converted, quantised, merged and fine-tuned as T5s are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from causal_folders import adapter_gradients, small_seeing, write_causal
from safetensors.torch import load_file
from small_causal import furthest, plain_logits, small_causal
from torch import Tensor
from toy_exports import run_export
from toy_finetunes import losses, make_adapter, toy

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, attach, find_sites
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.peft_folders import write_peft_lora
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.backbone.quantised_parts import keep_format
from mhr_scale.config import BackboneConfig, ConvertConfig, OriginConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import place
from mhr_scale.errors import AdapterError, BackboneError
from mhr_scale.verbs.convert import convert
from mhr_scale.verbs.finetune import finetune

pytestmark = pytest.mark.usefixtures("on_cpu")
#: Widths that 4 bits take, and ids that the byte tokenizer has.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
UNFUSED = {"fused_attention": False, "fused_norm": False, "fused_gate": False}
BYTES = {**WIDE, "vocab_size": 384, "eos_token_id": 1, "max_position_embeddings": 256}


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    transformers.utils.logging.disable_progress_bar()


def stock_logits(folder: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What transformers computes of a folder; every name has to be known and there."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(found.values())
    keep_format(model)
    return plain_logits(model)


def stored_names(folder: Path) -> set[str]:
    """Names of the tensors in the files, which are those that the hub has."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def place_folder(folder: Path, **settings: Any) -> Any:
    """The backbone of a folder as runs place it, its stored logits compared."""
    config = BackboneConfig(name=str(folder), **UNFUSED, **settings)
    return place(Engine({}, timeout_seconds=60), config, read_blueprint(config), ())


# -- convert ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "quantise", "changes"),
    [
        ("gpt2", "bfloat16", "none", {}),
        ("mixtral", "float32", "none", {}),
        ("opt", "float32", "none", {}),
        ("qwen2", "bfloat16", "int8", {}),  # with biases
        ("qwen3 moe", "bfloat16", "int8", {}),
        ("llama tied", "float32", "nf4", WIDE),
        ("phi", "bfloat16", "nf4", WIDE),
    ],
)
def test_a_converted_folder_is_what_transformers_reads_of_it(
    tmp_path: Path, family: str, dtype: Any, quantise: Any, changes: dict[str, Any]
) -> None:
    origin = OriginConfig(name=str(write_causal(tmp_path / "original", family, **changes)))
    out = str(tmp_path / "out")
    convert(ConvertConfig(backbone=origin, dtype=dtype, quantise=quantise, folder=out))
    convert(ConvertConfig(backbone=origin, folder=out, verify=True))
    placed = place_folder(tmp_path / "out", dtype=dtype)
    theirs = stock_logits(tmp_path / "out", getattr(torch, dtype))
    assert furthest(plain_logits(placed.model), theirs) == 0.0
    if quantise == "none":
        assert stored_names(tmp_path / "out") == stored_names(tmp_path / "original")
    exact = plain_logits(small_causal(family, **changes))
    assert furthest(theirs, exact) < {"int8": 0.1, "nf4": 1.0}.get(quantise, 0.05)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_what_is_converted_of_a_model_that_sees_is_a_text_model(tmp_path: Path, kind: str) -> None:
    seeing = small_seeing(kind)
    seeing.save_pretrained(tmp_path / "original")
    companions = ("chat_template.jinja", "vocab.json", "merges.txt")
    for name in companions:
        (tmp_path / "original" / name).write_text(f'"{name}"')
    origin = OriginConfig(name=str(tmp_path / "original"))
    convert(ConvertConfig(backbone=origin, dtype="float32", folder=str(tmp_path / "out")))
    assert furthest(stock_logits(tmp_path / "out"), plain_logits(seeing)) < 1e-5
    place_folder(tmp_path / "out", dtype="float32")
    for name in companions:
        assert (tmp_path / "out" / name).read_text() == f'"{name}"'


def test_an_adapter_over_a_text_model_of_another_goes_to_peft_once_that_is_converted(
    tmp_path: Path,
) -> None:
    small_seeing("mistral3").save_pretrained(tmp_path / "original")
    facts = {"name": str(tmp_path / "original"), "dtype": "float32"}
    adapter = make_single(tmp_path / "original", "lora")
    artefact.save(adapter, tmp_path / "run" / "adapter", backbone=facts)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    with pytest.raises(AdapterError, match="holds other models beside the text model") as caught:
        run_export(run, tmp_path / "exported", format="peft")
    assert len(str(caught.value).splitlines()) == 1
    origin = OriginConfig(name=facts["name"])
    convert(ConvertConfig(backbone=origin, dtype="float32", folder=out))
    run_export(run, tmp_path / "exported", format="peft", backbone_moved_to=out)
    run_export(run, tmp_path / "merged", format="merged", dtype="float32")
    assert stock_logits(tmp_path / "merged")


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "Conv1D"), ("falcon", "FalconLinear")])
def test_other_linears_than_plain_ones_are_not_quantised(
    tmp_path: Path, family: str, kind: str
) -> None:
    origin = OriginConfig(name=str(write_causal(tmp_path / "original", family)))
    with pytest.raises(BackboneError, match=f"is a {kind}, and only plain linears are quantised"):
        convert(ConvertConfig(backbone=origin, quantise="int8", folder=str(tmp_path / "out")))


# -- merge -----------------------------------------------------------------------------------------


def make_single(folder: Path, kind: Any) -> Adapter:
    """An adapter of all linears that moves logits a good deal."""
    with torch.device("meta"):
        model = make_model(read_blueprint(BackboneConfig(name=str(folder))))
    config = AdapterConfig(kind=kind, layout="full", rank=2, n_skills=1, alpha=3.0)
    adapter = Adapter(config, find_sites(model, "full"), task_names=("a",))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.2 * noise + (kind == "ia3"))
    return adapter


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "lora"), ("gpt2", "ia3"), ("qwen2", "ia3"), ("mixtral", "lora"), ("neox", "lora")],
)
def test_a_merged_folder_is_the_adapter_on_its_backbone(
    tmp_path: Path, family: str, kind: str
) -> None:
    folder = write_causal(tmp_path / "backbone", family)
    adapter = make_single(folder, kind)
    facts = {"name": str(folder), "dtype": "float32"}
    artefact.save(adapter, tmp_path / "run" / "adapter", backbone=facts)
    run_export(str(tmp_path / "run"), tmp_path / "out", format="merged", dtype="float32")
    model = small_causal(family)
    copied = attach(model, adapter.config, tasks=("a",))
    artefact.load_tensors(copied, artefact.named_tensors(adapter), place="the adapter")
    with copied.slots(["a"]):
        expected = plain_logits(model)
    assert furthest(stock_logits(tmp_path / "out"), expected) < 1e-5
    assert stored_names(tmp_path / "out") == stored_names(folder)


# -- recompute and fine-tune -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3 moe", "gpt2", "falcon new", "opt"])
def test_recomputation_changes_no_bit(tmp_path: Path, family: str) -> None:
    folder = write_causal(tmp_path, family)
    engine = Engine({}, timeout_seconds=60)
    plain, n_calls = adapter_gradients(engine, folder, "none")
    assert (len(plain) > 2, n_calls) == (True, 1)
    for mode in ("reentrant", "non_reentrant"):
        again, n_calls = adapter_gradients(engine, folder, mode)
        assert n_calls == 2
        assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize(
    ("quantise", "recompute"),
    [("none", "reentrant"), ("int8", "none"), ("nf4", "non_reentrant")],
)
def test_a_lora_is_fine_tuned_over_a_llama(tmp_path: Path, quantise: Any, recompute: Any) -> None:
    folder = write_causal(tmp_path / "backbone", "llama", **BYTES)
    base = BackboneConfig(name=str(folder), dtype="float32", tokenizer="byt5")
    lora = write_peft_lora(average(make_adapter(base)), tmp_path / "lora", base_model=str(folder))
    backbone = replace(base, quantise=quantise, recompute=recompute)
    finetune(toy(lora, tmp_path / "run", backbone=backbone))
    found = losses(tmp_path / "run")
    assert len(found) == 12
    assert sum(found[-4:]) < 0.98 * sum(found[:4])
