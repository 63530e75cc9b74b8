"""Converts a `.bin` file of 130 MB and tells how far the process's own memory grew meanwhile.

The comparison with transformers' reading of it is part of that.

Run by test_convert_compared.py: peak_memory.py FOLDER. Pages of mapped files do not count: the
system takes them back when it needs them. Prints one line of JSON, in bytes.
"""

import json
import re
import sys
import threading
from pathlib import Path

import torch

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig, ConvertConfig, OriginConfig
from mhr_scale.verbs.convert import convert

CARD = {
    "model_type": "t5",
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_heads": 8,
    "num_layers": 3,
    "vocab_size": 4096,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def own_memory() -> int:
    """Memory of this process that no file stands behind."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


class Watch(threading.Thread):
    """Notes the most memory that the process has, every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.peak = max(self.peak, own_memory())


def write_source(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """A checkpoint as the hub has it; returns its size and its largest tensor's, in bytes."""
    fields = {name: value for name, value in CARD.items() if name != "model_type"}
    source = read_blueprint(BackboneConfig(config=fields)).source
    tensors = {name: (0.1 * torch.randn(source.shape(name))).to(dtype) for name in source.names()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CARD))
    torch.save(tensors, folder / "pytorch_model.bin")
    largest = max(tensor.nbytes for tensor in tensors.values())
    return (folder / "pytorch_model.bin").stat().st_size, largest


def main(place: Path) -> None:
    # a conversion of something small first, so that imports and pools do not count
    toy = OriginConfig(name="builtin:toy")
    convert(ConvertConfig(backbone=toy, folder=str(place / "toy")))
    size, largest = write_source(place / "source")
    origin, watch = OriginConfig(name=str(place / "source")), Watch()
    before = own_memory()
    watch.start()
    convert(ConvertConfig(backbone=origin, folder=str(place / "out")))
    watch.over.set()
    watch.join()
    print(json.dumps({"source": size, "largest": largest, "grown": watch.peak - before}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
