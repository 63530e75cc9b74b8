"""Attaching, loading and exporting with torch, safetensors and transformers alone."""

from pathlib import Path

from processes import ROOT, run_code

#: Hides every distribution that those three do not need, and pydantic, which a console tool of
#: transformers needs.
HIDE = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

found, waiting = set(), ["torch", "safetensors", "transformers"]
while waiting:
    name = waiting.pop().lower().replace("_", "-")
    try:
        needs = [] if name in found | {"pydantic"} else requires(name) or []
    except PackageNotFoundError:
        continue
    found.add(name)
    waiting += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra ==" not in need]
found = found - {"pydantic"} | {"mhr-scale"}
hidden = {
    module
    for module, owners in packages_distributions().items()
    if not {owner.lower().replace("_", "-") for owner in owners} & found
}
wanted = {"deepspeed", "peft", "pydantic", "psutil", "datasets", "pyarrow", "accelerate", "scipy"}
assert wanted <= hidden and not {"numpy", "yaml", "huggingface_hub", "torch"} & hidden

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        is_hidden = name.partition(".")[0] in hidden
        return None if is_hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

USE = """
import copy, sys, torch
from transformers import AutoModelForSeq2SeqLM
from mhr_scale import AdapterConfig, attach, load_adapter, save_adapter
from mhr_scale.config import ExportConfig
from mhr_scale.verbs.export import export

def logits(model, adapter):
    with torch.no_grad(), adapter.slots(["b", "a"]):
        return model(input_ids=ids, labels=ids).logits

base, ids = sys.argv[1], torch.arange(3, 11).reshape(2, 4)
model = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
bare = copy.deepcopy(model)
adapter = attach(model, AdapterConfig(n_skills=2), tasks=["a", "b"])
with torch.no_grad():
    for number, tensor in enumerate(adapter.parameters()):
        tensor.copy_(torch.linspace(-0.5, 0.5 + number % 3, tensor.numel()).view_as(tensor))
save_adapter(adapter, "adapter", backbone={"name": base, "dtype": "float32"})
first = logits(model, adapter)
assert not torch.equal(first, bare(input_ids=ids, labels=ids).logits)
assert torch.equal(first, logits(bare, load_adapter("adapter", model=bare)))

for name, is_checked in (("native", True), ("merged", True), ("peft", False), ("peft_poly", False)):
    export(ExportConfig(adapter="adapter", folder=name, format=name, check=is_checked))
again = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
assert torch.equal(first, logits(again, load_adapter("native", model=again)))
"""


def test_an_adapter_is_attached_loaded_and_exported_with_transformers_alone(tmp_path: Path) -> None:
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    base = ROOT / "mhr_scale" / "tasks" / "toy_backbone"
    printed = run_code(path + HIDE + USE, str(base), folder=tmp_path)
    assert printed.count("logits are the original's") == 2
    for name in ("native/adapter.safetensors", "peft/adapter_config.json"):
        assert (tmp_path / name).is_file()
