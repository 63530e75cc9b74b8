"""A published checkpoint is one file of a repository on the hub."""

from pathlib import Path

from hub_server import hub_at, serving
from safetensors.torch import save_file
from toy_exports import assert_same, make

from mhr_scale.adapters import artefact
from mhr_scale.backbone.of_adapter import open_adapter


def test_a_published_checkpoint_is_a_file_of_a_repository(tmp_path: Path) -> None:
    sides = {"A": "lora_a", "B": "lora_b"}
    tensors = {
        f"model.{linear}.{sides[side]}": tensor.contiguous()
        for name, tensor in artefact.named_tensors(make("LoRA")).items()
        for linear, _, side in [name.rpartition(".")]
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with serving() as hub, hub_at(hub.url, tmp_path / "cache"):
        hub.add("o/published", {"a/b.safetensors": (tmp_path / "lora.safetensors").read_bytes()})
        name = "o/published@main:a/b.safetensors"
        card, found = open_adapter(name, "builtin:toy")
        assert_same(found, open_adapter(str(tmp_path / "lora.safetensors"), "builtin:toy")[1])
        assert card.origin["path"] == name.replace(
            "main", hub.repositories["o/published"].branches["main"]
        )
