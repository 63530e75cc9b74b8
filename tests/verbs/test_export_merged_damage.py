"""The verb `export`, format merged: what is written wrongly is noticed, and nothing is left."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor
from toy_exports import make, run_export, save_run, save_runs

from mhr_scale.adapters import artefact
from mhr_scale.backbone import merging
from mhr_scale.errors import AdapterError

NORM = "decoder.final_layer_norm.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("runs"), "LoRA")


def spoiled(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tensors of every shard be changed before they are written."""

    def write_changed(file: Path, shard: Any, read: Any, **options: Any) -> None:
        tensors = {w.name: read(w, 0, w.numel).view(w.shape).clone() for w in shard}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_shard", write_changed)


def add(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM] + 0.02


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM] * float("nan")


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[NORM]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add, r"the logits of what transformers loads differ .* more than 1e-05"),
        (poison, "the logits of what transformers loads differ from the original's by nan"),
        (drop, r"transformers does not load it as it is: .*decoder\.final_layer_norm"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_damaged_merged_backbone_is_noticed_and_nothing_is_left(
    change: Any, words: str, dtype: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(change, monkeypatch)
    with pytest.raises(AdapterError, match=words):
        run_export(str(runs / "LoRA"), tmp_path / "out", format="merged", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_sum_is_noticed_though_rounding_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make("LoRA")
    for name, tensor in artefact.named_tensors(adapter).items():
        tensor.mul_(0.01 if name.endswith(".B") else 1.0)
    run, merge = save_run(tmp_path / "run", adapter), merging.merge

    def merge_wrongly(name: str, weight: Tensor, pairs: Any, *, scale: float) -> Tensor:
        return merge(name, weight, pairs, scale=1.1 * scale)

    monkeypatch.setattr(merging, "merge", merge_wrongly)
    with pytest.raises(AdapterError, match="the logits of the merged weights differ"):
        run_export(run, tmp_path / "out", format="merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
