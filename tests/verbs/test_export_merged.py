"""The verb `export`, format merged: a backbone with an adapter in its weights, in shards."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_t5 import stored
from torch import Tensor, nn
from toy_exports import (
    BASE,
    FACTS,
    KINDS,
    TASKS,
    assert_close,
    make,
    native_logits,
    run_export,
    save_run,
    save_runs,
    stock_logits,
    toy_t5,
)
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from mhr_scale.adapters import Adapter, artefact, find_sites
from mhr_scale.adapters.collapse import average, collapse
from mhr_scale.backbone import merging
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.backbone.shards import Weight
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import AdapterError, BackboneError, RunError

SIZES = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 400}
MERGED = {"format": "merged", "dtype": "float32"}
NORM = "decoder.final_layer_norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("runs"), "MHR", "LoRA", "IA3")


def summed(adapter: Adapter, name: str) -> Tensor:
    """The weight with the adapter in it, entry by entry of its columns, in float64."""
    weight = stored(BASE)[name].double()
    tensors = {key: t.double() for key, t in artefact.named_tensors(adapter).items()}
    linear = name.removesuffix(".weight")
    if adapter.config.kind == "ia3":
        return torch.stack(
            [row * factor for row, factor in zip(weight, tensors[f"{linear}.l"][0, 0])]
        )
    a_IR, b_RO = tensors[f"{linear}.A"][0, 0], tensors[f"{linear}.B"][0, 0]
    columns = [
        column + adapter.config.alpha / adapter.config.rank * (a_R @ b_RO)
        for column, a_R in zip(weight.T, a_IR)
    ]
    return torch.stack(columns, 1)


# --- weights


@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_transformers_gives_the_logits_of_the_original(
    kind: str, runs: Path, tmp_path: Path
) -> None:
    folder = run_export(str(runs / kind), tmp_path / "out", **MERGED)
    assert_close(stock_logits(folder), native_logits(make(kind)))


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"what": "average"}, average),
        ({"what": "task", "task": TASKS[1]}, lambda adapter: collapse(adapter, TASKS[1])),
    ],
    ids=["average", "task"],
)
def test_an_inventory_is_merged_as_its_average_or_a_task(
    settings: dict, change: Any, runs: Path, tmp_path: Path
) -> None:
    folder = run_export(str(runs / "MHR"), tmp_path / "out", **MERGED, **settings)
    assert_close(stock_logits(folder), native_logits(change(make("MHR"))))


@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_a_weight_is_rounded_once_after_the_sum(kind: str, runs: Path, tmp_path: Path) -> None:
    folder, adapter = run_export(str(runs / kind), tmp_path / "out", format="merged"), make(kind)
    for site in adapter.sites:
        name = f"{site.name}.weight"
        exact, found = summed(adapter, name), stored(folder)[name]
        assert found.dtype == torch.bfloat16
        # sums in float32 that lie on an edge fall to either side
        assert (found != exact.bfloat16()).double().mean() < 2e-3


def test_weights_without_an_adapter_are_the_backbones_own_bits(runs: Path, tmp_path: Path) -> None:
    folder = run_export(str(runs / "MHR"), tmp_path / "out", format="merged")
    before, after = stored(BASE), stored(folder)
    adapted = {f"{site.name}.weight" for site in make("MHR").sites}
    assert before.keys() == after.keys()
    assert {name for name in after if not torch.equal(before[name], after[name])} == adapted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_weights_and_the_configuration_have_the_data_type_asked_for(
    dtype: str, runs: Path, tmp_path: Path
) -> None:
    folder = run_export(str(runs / "LoRA"), tmp_path / "out", format="merged", dtype=dtype)
    assert {tensor.dtype for tensor in stored(folder).values()} == {getattr(torch, dtype)}
    assert T5ForConditionalGeneration.from_pretrained(folder).dtype == getattr(torch, dtype)


# --- shards


def test_shards_are_no_larger_than_asked_for_and_listed(runs: Path, tmp_path: Path) -> None:
    folder = run_export(str(runs / "LoRA"), tmp_path / "out", max_shard_bytes=60_000, **MERGED)
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert [shard.name for shard in shards] == names
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 60_000
    assert index["metadata"]["total_size"] == sum(sizes)
    listed = {shard.name: set(load_file(shard)) for shard in shards}
    found = {shard: {n for n, s in index["weight_map"].items() if s == shard} for shard in names}
    assert listed == found
    assert_close(stock_logits(folder), native_logits(make("LoRA")))


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(runs: Path, tmp_path: Path) -> None:
    folder = run_export(str(runs / "LoRA"), tmp_path / "out", max_shard_bytes=1, **MERGED)
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) == len(stored(BASE))
    assert_close(stock_logits(folder), native_logits(make("LoRA")))


def test_one_file_needs_no_index(runs: Path, tmp_path: Path) -> None:
    folder = run_export(str(runs / "LoRA"), tmp_path / "out", format="merged")
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


class WatchedSource:
    """A source that notes which tensors are read."""

    def __init__(self, source: Any) -> None:
        self.source: Any = source
        self.read_names: list[str] = []

    def names(self) -> frozenset[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def view(self, name: str) -> Tensor | None:
        return None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        self.read_names.append(name)
        return self.source.read(name, start, stop)


@pytest.mark.parametrize("size", [1, 40_000, 10**9])
def test_a_tensor_is_read_when_its_turn_to_be_written_comes_and_once(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhr_scale.backbone.shards.CHUNK", 1000)
    blueprint = read_blueprint(BackboneConfig(name="builtin:toy"))
    weights = merging.plan_weights(blueprint, None)
    source, write, written = WatchedSource(blueprint.source), merging.write_shard, []

    def write_watched(file: Path, shard: Any, read: Any, *, advance: Any) -> Any:
        def watched(weight: Weight, start: int, stop: int) -> Tensor:
            if start == 0:
                assert source.read_names == written
                written.append(weight.name)
            return read(weight, start, stop)

        return write(file, shard, watched, advance=advance)

    monkeypatch.setattr(merging, "write_shard", write_watched)
    watched = replace(blueprint, source=source)
    merging.write_merged(
        make("LoRA"), tmp_path, blueprint=watched, weights=weights, max_shard_bytes=size
    )
    assert source.read_names == [weight.name for weight in weights]


def test_tensors_of_several_data_types_lie_where_readers_find_them(
    tmp_path: Path,
) -> None:
    """A tensor begins at a multiple of its numbers' size only if narrower ones come after it."""
    folder = shutil.copytree(BASE, tmp_path / "t5")
    mixed = {name: t.float() if name == NORM else t for name, t in stored(BASE).items()}
    mixed["lm_head.weight"] = mixed["lm_head.weight"].float()
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    run = save_run(tmp_path / "run", make("LoRA"), backbone={"name": str(folder)})
    merged = stored(run_export(run, tmp_path / "out", format="merged"))
    assert {name: t.dtype for name, t in merged.items()} == {n: t.dtype for n, t in mixed.items()}
    assert torch.equal(merged[NORM], mixed[NORM])


# --- tied tensors, configurations, companions


def backbone_folder(folder: Path, *, tied: bool, **changes: Any) -> Path:
    """A backbone that transformers saved, its head tied or a tensor of its own."""
    torch.manual_seed(5)
    fields = {**SIZES, "decoder_start_token_id": 0, "tie_word_embeddings": tied, **changes}
    model = T5ForConditionalGeneration(T5Config(**fields))
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    return folder


def on(model: nn.Module, folder: Path, **facts: Any) -> tuple[str, Adapter]:
    """A run with a random LoRA on this backbone, and the adapter."""
    config = KINDS["LoRA"]
    if not model.config.is_gated_act:
        config = KINDS["MHR of alpha 3"]
    adapter = Adapter(config, find_sites(model, config.layout), task_names=TASKS)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapter = average(adapter) if config.is_routed else adapter
    return save_run(folder, adapter, backbone=facts), adapter


@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_embeddings_are_written_once_and_untied_ones_twice(
    tied: bool, act: str, tmp_path: Path
) -> None:
    folder = backbone_folder(tmp_path / "t5", tied=tied, feed_forward_proj=act)
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    run, adapter = on(model, tmp_path / "run", name=str(folder))
    merged = run_export(run, tmp_path / "out", format="merged")
    embeddings = {name for name in stored(merged) if "embed" in name or "shared" in name}
    assert embeddings == {"shared.weight"}
    assert ("lm_head.weight" in stored(merged)) == (not tied)
    assert_close(stock_logits(merged), native_logits(adapter, model=model.eval()))


def test_a_configuration_that_is_wrong_of_ties_changes_nothing(tmp_path: Path) -> None:
    folder = backbone_folder(tmp_path / "t5", tied=False, feed_forward_proj="gated-gelu")
    config = json.loads((folder / "config.json").read_text())
    config.pop("scale_decoder_outputs")
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    run, adapter = on(model, tmp_path / "run", name=str(folder))
    merged = run_export(run, tmp_path / "out", format="merged")
    assert_close(stock_logits(merged), native_logits(adapter, model=model.eval()))


def test_weights_that_were_never_stored_can_be_merged_too(tmp_path: Path) -> None:
    fields = {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = BackboneConfig(config=fields, dtype="float32")
    blueprint = read_blueprint(config)
    with torch.device("meta"):
        model = make_model(blueprint)
    run, _ = on(model, tmp_path / "run", **blueprint.facts)
    merged = run_export(run, tmp_path / "out", format="merged")
    assert stock_logits(merged).isfinite().all()
    tokens = AutoTokenizer.from_pretrained(merged)(["ab"])["input_ids"]
    assert tokens == [[100, 101, 1]]


def test_the_tokenizer_comes_along(runs: Path, tmp_path: Path) -> None:
    folder = run_export(str(runs / "LoRA"), tmp_path / "out", format="merged")
    found, expected = (AutoTokenizer.from_pretrained(place) for place in (folder, BASE))
    assert found("a b c do:copy")["input_ids"] == expected("a b c do:copy")["input_ids"]


def test_a_tokenizer_of_another_place_comes_along(tmp_path: Path) -> None:
    facts = {**FACTS, "tokenizer": str(BASE)}
    bare = shutil.copytree(BASE, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    run = save_run(tmp_path / "run", make("LoRA"), backbone={**facts, "name": str(bare)})
    folder = run_export(run, tmp_path / "out", format="merged")
    assert len(AutoTokenizer.from_pretrained(folder)) == 50


def test_generation_settings_come_along(tmp_path: Path) -> None:
    folder = shutil.copytree(BASE, tmp_path / "t5")
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 3, "max_length": 7}))
    run = save_run(tmp_path / "run", make("LoRA"), backbone={"name": str(folder)})
    merged = run_export(run, tmp_path / "out", format="merged")
    model = T5ForConditionalGeneration.from_pretrained(merged)
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (3, 7)


# --- a job that trained the backbone too


@pytest.fixture
def trained(tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    """A finished job with a LoRA and weights of its own."""
    weights = {name: tensor.float() * 1.1 for name, tensor in stored(BASE).items()}
    origin = {"job": "a/0/full", "backbone": "backbone.safetensors"}
    run = save_run(tmp_path / "job", make("LoRA"), origin=origin)
    save_file(weights, tmp_path / "job" / "backbone.safetensors")
    return run, weights


def test_a_backbone_that_a_job_trained_is_merged_with_its_adapter(
    trained: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    run, weights = trained
    folder = run_export(run, tmp_path / "out", format="merged")
    model = T5ForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    model.load_state_dict({**model.state_dict(), **weights})
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    assert {tensor.dtype for tensor in stored(folder).values()} == {torch.float32}
    assert_close(stock_logits(folder), native_logits(make("LoRA"), model=model.eval()))


def test_a_job_without_the_weights_it_trained_is_refused(
    trained: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "job" / "backbone.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"backbone\.safetensors: missing, though the job"):
        run_export(trained[0], tmp_path / "out", format="merged")


# --- what fails


def test_a_disk_without_room_is_refused_before_anything_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RunError, match=r"takes .* kB and .* has 1\.0 kB left; name a folder on"):
        run_export(str(runs / "LoRA"), tmp_path / "out", format="merged")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_backbone_needs_its_backbone(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make("LoRA"), backbone={})
    with pytest.raises(AdapterError, match=r"trained on; set backbone_moved_to$"):
        run_export(run, tmp_path / "out", format="merged", check=False)


def test_the_toy_backbone_is_in_bfloat16_so_that_rounding_is_tested() -> None:
    assert {tensor.dtype for tensor in stored(BASE).values()} == {torch.bfloat16}
    assert toy_t5().dtype == torch.float32
