"""A random T0 in the layout of the hub: one float32 `pytorch_model.bin`, written tensor by tensor.

The names are those that transformers 4 wrote, the embedding three times among them; config.json
says nothing of `tie_word_embeddings`; the tokenizer is a `spiece.model` without `tokenizer.json`.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from torch.serialization import skip_data

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.weights import read_whole
from mhr_scale.config import BackboneConfig
from mhr_scale.families.known_sizes import KNOWN
from mhr_scale.families.t5 import EMBEDDING, EMBEDDING_ALIASES
from mhr_scale.run.runlog import ByteProgress

#: Sizes by name: T0-11B, T0-3B, and one to try the benchmark with.
SIZES: dict[str, dict[str, Any]] = {
    "xxl": KNOWN["bigscience/T0"],
    "xl": KNOWN["bigscience/T0_3B"],
    "tiny": {**KNOWN["bigscience/T0_3B"], "d_model": 128, "d_ff": 256, "num_heads": 2,
             "num_layers": 2, "vocab_size": 4224},
}  # fmt: skip
PIECES, SENTINELS = 4000, 100


def write(folder: Path, size: str, texts: Iterable[str]) -> None:
    """Write the folder; the tokenizer is trained on `texts`."""
    folder.mkdir(parents=True)
    fields = SIZES[size]
    config = {**fields, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
              "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), vocab_size=PIECES,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, model_type="unigram", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    settings = {"extra_ids": SENTINELS, "tokenizer_class": "T5Tokenizer", "eos_token": "</s>",
                "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    _write_weights(folder, fields)


def _write_weights(folder: Path, fields: dict[str, Any]) -> None:
    """First the file's frame around holes, then the numbers of each tensor where it lies."""
    source = read_blueprint(BackboneConfig(config=fields)).source
    shapes = {name: source.shape(name) for name in sorted(source.names())}
    hole, file = folder / "hole", folder / "pytorch_model.bin"
    with hole.open("wb") as opened:
        opened.truncate(4 * max(math.prod(shape) for shape in shapes.values()))

    def empty(shape: tuple[int, ...]) -> Tensor:
        storage = torch.UntypedStorage.from_file(str(hole), True, 4 * math.prod(shape))
        return torch.empty(0).set_(storage, 0, shape)

    tensors = {name: empty(shape) for name, shape in shapes.items()}
    tensors |= dict.fromkeys(EMBEDDING_ALIASES, tensors[EMBEDDING])
    with skip_data():
        torch.save(tensors, file)
    hole.unlink()
    stored = torch.load(file, map_location="meta", weights_only=True)
    progress = ByteProgress(file.stat().st_size, what="random weights")
    with file.open("r+b") as opened:
        for name in shapes:
            opened.seek(stored[name].untyped_storage()._checkpoint_offset)
            numbers = read_whole(source, name).contiguous()
            opened.write(numbers.numpy().data)
            progress.add(name, numbers.nbytes)
    progress.close()
