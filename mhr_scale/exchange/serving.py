"""What servers of many LoRAs over one backbone take, and how they are started: vLLM and LoRAX.

vLLM (`vllm/config/lora.py`, `MaxLoRARanks`): `--max-lora-rank` is one of few numbers, and every
`r` of an adapter_config.json is at most that. The end of a tensor's name has to be that of a linear
that it knows (`vllm/lora/lora_model.py`); `target_modules` lists such ends. `NAME=PATH` is split at
its `=`, and what has a comma is read as JSON (`LoRAParserAction`).
LoRAX (`server/lorax_server/adapters/lora.py`): pads ranks itself, to 8 and to multiples of 16, and
leaves a kind of linear out of an adapter that lacks it in one layer.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mhr_scale.errors import AdapterError, counted

#: Values of vLLM's `--max-lora-rank`; newer versions take 1 too.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: How many different LoRAs a batch may mix unless the recipe says: each takes its room on the GPU.
MOST_AT_ONCE = 16
#: Longer lists of LoRAs are not printed.
SHOWN = 8
MANIFEST, SCRIPT, LORAS = "manifest.json", "vllm.sh", "loras"


def served_rank(rank: int) -> int:
    """The smallest rank that servers take for a LoRA of `rank`; raises `AdapterError` above all."""
    fitting = next((accepted for accepted in RANKS if accepted >= rank), None)
    if fitting is None:
        raise AdapterError(
            f"rank {rank} is more than the {RANKS[-1]} that servers take; set format: merged"
        )
    return fitting


def ends_of(linears: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of names that name these linears of a model, and none of its others."""
    wanted, others = set(linears), set(modules) - set(linears)
    for n_parts in range(1, max(linear.count(".") for linear in linears) + 1):
        ends = {".".join(linear.split(".")[-n_parts:]) for linear in linears}
        if not any(other.endswith(tuple(f".{end}" for end in ends)) for other in others):
            return sorted(ends)
    return sorted(wanted)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One name that a server knows, and the folder of its LoRA below the exported one."""

    name: str
    folder: str
    adapter: str
    task: str | None
    job: Mapping[str, Any] | None
    trained_rank: int
    rank: int
    alpha: float
    sha256: str
    """Of the folder's tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """An exported folder: its backbone as a server finds it, and all that is served over it."""

    base: str
    revision: str | None
    targets: Sequence[str]
    loras: Sequence[Served]
    max_loras: int | None
    licence: Mapping[str, str] = field(default_factory=dict)
    """By the hub's names of its fields."""

    @property
    def folders(self) -> list[str]:
        """The LoRAs' folders, each once."""
        return list(dict.fromkeys(lora.folder for lora in self.loras))

    @property
    def max_rank(self) -> int:
        """The largest rank in the folder."""
        return max(lora.rank for lora in self.loras)

    @property
    def mixed(self) -> int:
        """How many different LoRAs a batch may mix."""
        return self.max_loras or min(len(self.folders), MOST_AT_ONCE)

    def manifest(self) -> dict[str, Any]:
        """What a program reads to find a LoRA by its name."""
        return {
            "base_model": self.base,
            "revision": self.revision,
            "max_lora_rank": self.max_rank,
            "target_modules": list(self.targets),
            "loras": [asdict(lora) for lora in self.loras],
        }

    # -- commands ------------------------------------------------------------------------------

    def _backbone(self) -> str:
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision else ""
        return shlex.quote(self.base) + revision

    def vllm(self, *, extra: str = "") -> list[str]:
        """The lines of vLLM's command, which is given in the exported folder."""
        limits = f"--max-loras {self.mixed} --max-cpu-loras {max(len(self.loras), self.mixed)}"
        modules = [_module(lora.name, lora.folder, self.base) for lora in self.loras]
        lines = [
            f"vllm serve {self._backbone()}{extra}",
            f"  --enable-lora --max-lora-rank {self.max_rank} {limits}",
            "  --lora-modules",
            *(f"    {module}" for module in modules),
        ]
        return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]

    def lorax(self, folder: Path) -> list[str]:
        """The lines that start LoRAX, and one request to it."""
        where = str(folder.absolute() / self.loras[0].folder)
        parameters = {"adapter_id": where, "adapter_source": "local"}
        request = json.dumps({"inputs": "...", "parameters": parameters})
        return [
            f"lorax-launcher --model-id {self._backbone()} --max-active-adapters {self.mixed}",
            "curl 127.0.0.1:3000/generate -H 'Content-Type: application/json' \\",
            f"  -d {shlex.quote(request)}",
        ]

    def script(self) -> str:
        """vLLM's command as a script of the folder, which may be moved as a whole."""
        lines = [
            "#!/bin/sh",
            "# vLLM over all LoRAs of this folder; further options of vLLM go behind its name.",
            'cd -- "$(dirname -- "$0")" || exit',
            *self.vllm(extra=' "$@"'),
        ]
        return "\n".join([*lines[:3], f"exec {lines[3]}", *lines[4:]]) + "\n"

    # -- words ---------------------------------------------------------------------------------

    def commands(self, folder: Path) -> list[str]:
        """What is printed at the end: both servers' commands, a long one by its script alone."""
        script = [f"sh {shlex.quote(str(folder / SCRIPT))}"]
        if len(self.loras) <= SHOWN:
            script += ["which is, in that folder:", *self.vllm()]
        return ["vLLM:", *_inset(script), "LoRAX:", *_inset(self.lorax(folder))]

    def readme(self, folder: Path) -> str:
        """The folder's own page: what is served, and how."""
        n_folders = len(self.folders)
        front = {"library_name": "peft", "tags": ["lora"], **self.licence}
        if not Path(self.base).is_absolute():  # else it is no model of the hub
            front = {"base_model": self.base, **front}
        rows = [
            f"| {_cell(lora.name)} | {_cell(lora.folder)} | {lora.rank} ({lora.trained_rank}) |"
            for lora in self.loras
        ]
        doubles = "" if n_folders == len(self.loras) else ": equal ones share one"
        return "\n".join(
            [
                "---",
                *(f"{name}: {json.dumps(value)}" for name, value in front.items()),
                "---",
                "",
                f"# LoRAs over {self.base}, served together",
                "",
                f"{counted(len(self.loras), 'LoRA')} in {counted(n_folders, 'folder')}{doubles}. "
                "Each folder is a stock PEFT LoRA in float32.",
                f"Ranks are padded with zeros to {self.max_rank} at most, which servers take; "
                f"`{MANIFEST}` has names, tasks, jobs, ranks and hashes.",
                *([f"Revision of the backbone: `{self.revision}`."] if self.revision else []),
                "",
                "vLLM: `sh vllm.sh` in this folder, which is the command below; a request names a "
                "LoRA as its `model`.",
                "",
                *_block(self.vllm()),
                "",
                "LoRAX: any folder by request, as an absolute path where the server runs.",
                "",
                *_block(self.lorax(folder)),
                "",
                "PEFT: `model.load_adapter(FOLDER, adapter_name=NAME)` for each, then "
                "`model.generate(..., adapter_names=[...])`, a name for each row.",
                "",
                "| name | folder | rank (as trained) |",
                "|---|---|---|",
                *rows,
                "",
            ]
        )


def _module(name: str, path: str, base: str) -> str:
    """One value of `--lora-modules`; as JSON where `NAME=PATH` would be read otherwise."""
    if not {"=", ","} & set(name + path):
        return shlex.quote(f"{name}={path}")
    return shlex.quote(json.dumps({"name": name, "path": path, "base_model_name": base}))


def _cell(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _inset(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _block(lines: Iterable[str]) -> list[str]:
    return ["```sh", *lines, "```"]
