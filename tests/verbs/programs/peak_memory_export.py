"""Exports a LoRA of a backbone in bfloat16 and tells how far the process's own memory grew.

Run by test_export_memory.py: peak_memory_export.py FOLDER. Prints one line of JSON, in bytes: the
backbone and its largest tensor in float32, and the growth by format.
"""

import ctypes
import json
import sys
from pathlib import Path

import torch
from peak_memory import Watch, own_memory, write_source

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, find_sites
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import BackboneConfig, ExportConfig
from mhr_scale.verbs.export import export

CONFIG = AdapterConfig(layout="full", rank=2, n_skills=1)


def write_run(folder: Path, backbone: str) -> str:
    """A run with a LoRA on a backbone."""
    with torch.device("meta"):
        model = make_model(read_blueprint(BackboneConfig(name=backbone)))
    adapter = Adapter(CONFIG, find_sites(model, CONFIG.layout), task_names=["a"])
    for parameter in adapter.parameters():
        parameter.data.normal_(0.0, 0.02)
    artefact.save(adapter, folder / "adapter", backbone={"name": backbone, "dtype": "bfloat16"})
    return str(folder)


def main(place: Path) -> None:
    stored, largest = write_source(place / "source", torch.bfloat16)
    toy = write_run(place / "toy_run", "builtin:toy")
    run = write_run(place / "run", str(place / "source"))
    grown = {}
    for form in ("peft", "native", "merged"):
        # an export of something small first, so that imports and pools do not count
        export(ExportConfig(adapter=toy, folder=str(place / f"toy_{form}"), format=form))
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed before would count as there
        watch, before = Watch(), own_memory()
        watch.start()
        export(ExportConfig(adapter=run, folder=str(place / form), format=form))
        watch.over.set()
        watch.join()
        grown[form] = watch.peak - before
    print(json.dumps({"whole": 2 * stored, "largest": 2 * largest, "grown": grown}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
