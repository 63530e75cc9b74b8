"""Damage, drawn from a seed: of bytes, lines, trees of values, tensors and whole files."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load, save

Bytes = Callable[[random.Random, bytes], bytes]

DEEP, LONG = "stands for deep nesting", "stands for a very long number"
CHANGES = (*["size"] * 5, "odd", "kind", "remove", "rename", "add", "nest", "twice")
STANDINS = {json.dumps(DEEP): "[" * 5000 + "]" * 5000, json.dumps(LONG): "9" * 5000}
#: None of them may be written to: a door that is handed one has to refuse it.
PATHS = ("../..", "..", ".", "/proc/nowhere/x", "/dev/null", "/dev/null/x", "no/such/place", "a\0b")
NUMBERS = (-1, 0, 1, 3, 2**31, 2**63, 10**18, 10**30, -(10**18), 0.5, -0.0, 1e-320, 1e308, -1e308)
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))
TEXTS = ("", " ", "x" * 5000, "\ud800", "\u202e\u0000\n\t", "no", "1e-3", "\U0001f600", "a\nb: c")
SNIPPETS = ("&a *a", "!!python/object:os.system {}", "# \u00e9", "{", "- - -", "{{ x }}")
ODD = (None, True, False, [], {}, [[]], {"a": {"b": []}}, DEEP, LONG)
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 12)
)


# --- bytes and lines


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, flip, duplicate or insert some bytes."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 2, 16, 1000)))
    noise = bytes(rng.randrange(256) for _ in range(rng.choice((1, 3, 40))))
    return rng.choice(
        (
            data[:start],
            data[:start] + data[stop:],
            data[:start] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:stop])
            + data[stop:],
            data[:stop] + data[start:],
            data[:start] + noise + data[start:],
            data[:start] + noise + data[start + len(noise) :],
            b"",
            data + b"\0" * 8,
        )
    )  # fmt: skip


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """Delete, duplicate, swap, indent or join lines."""
    lines = data.split(b"\n")
    here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.randrange(6)
    if what == 0:
        del lines[here]
    elif what == 1:
        lines.insert(there, lines[here])
    elif what == 2:
        lines[here], lines[there] = lines[there], lines[here]
    elif what == 3:
        lines[here] = b"  " + lines[here]
    elif what == 4:
        lines[here : here + 2] = [b"".join(lines[here : here + 2])]
    else:
        text = rng.choice(
            (*TEXTS, *PATHS, "&a *a", "!!python/object:os.system {}", "# \u00e9", "{")
        )
        lines[here] = text.encode("utf-8", errors="surrogatepass")
    return b"\n".join(lines)


# --- trees of values


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """Change one value of a tree of plain values: its type, size, name or place."""
    root = {"root": tree}
    holder, key = rng.choice(_places(root))
    value = holder[key]
    what = rng.choice(CHANGES)
    if what == "odd":
        holder[key] = rng.choice((*ODD, *NUMBERS, *NO_NUMBERS, *TEXTS, *PATHS))
    elif what == "kind":
        holder[key] = _of_another_kind(value)
    elif what == "size":
        holder[key] = _of_another_size(rng, value)
    elif what == "nest":
        holder[key] = rng.choice(
            ([value], {"value": value}, {key if holder is not root else "": value})
        )
    elif what == "twice" and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), value)
    elif isinstance(holder, list) or holder is root:
        holder[key] = rng.choice((None, [value, value]))
    elif what == "remove":
        del holder[key]
    elif what == "rename":
        holder[rng.choice((key[:-1], key + "x", key.upper(), "../" + key, ""))] = holder.pop(key)
    else:
        holder[rng.choice(("unknown", key + "s", "", "../..", "__class__"))] = rng.choice(
            (1, value)
        )
    return root["root"]


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key below a root, outer ones as likely as many inner ones together."""
    found: list[tuple[Any, Any]] = []
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        inner = _places(tree[key]) if isinstance(tree[key], dict | list) else []
        found += [(tree, key)] * max(1, len(inner) // 12) + inner
    return found


def _of_another_kind(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list):
        return {str(number): item for number, item in enumerate(value)}
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool):
        return str(value)
    if value is None:
        return 0
    return str(value)


def _of_another_size(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return rng.choice((*NUMBERS, not value))
    if isinstance(value, int | float):
        others = [number for number in NUMBERS if type(number) is type(value)]
        return rng.choice(
            (*others, *others, *NO_NUMBERS, value + 1, -value, value * 2, float(value))
        )
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        others = (value[:at], value[:at] + rng.choice("xX.-/\n\0") + value[at:], value * 300)
        return rng.choice((*others, *TEXTS, *PATHS))
    if isinstance(value, list):
        return rng.choice((value[:-1], value[::-1], value * 2, []))
    return {}


def _dump(tree: Any) -> str:
    """JSON text, with what no writer writes in the place of its stand-ins."""
    text = json.dumps(tree, indent=1)
    for standin, meant in STANDINS.items():
        text = text.replace(standin, meant)
    return text


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Change one value of a JSON file, or its text."""
    if rng.random() < 0.2:
        return rng.choice((mutate_bytes, mutate_lines))(rng, data)
    return _dump(mutate_tree(rng, json.loads(data))).encode()


def mutate_jsonl(rng: random.Random, data: bytes) -> bytes:
    """Change one value of one line, or the text of the file."""
    if rng.random() < 0.3:
        return rng.choice((mutate_bytes, mutate_lines))(rng, data)
    lines = data.splitlines(keepends=True)
    for number in rng.sample(range(len(lines)), min(len(lines), rng.choice((1, 1, 3)))):
        changed = _dump(mutate_tree(rng, json.loads(lines[number])))
        lines[number] = changed.replace("\n", "").encode() + b"\n"
        if not changed.startswith("{"):
            break
    return b"".join(lines)


def mutate_yaml(rng: random.Random, data: bytes) -> bytes:
    """Change one value of a YAML file (JSON is YAML), or its text; sometimes a bomb of aliases."""
    chance = rng.random()
    if chance < 0.02:
        return BOMB.encode() + data
    if chance < 0.3:
        return rng.choice((mutate_bytes, mutate_lines))(rng, data)
    return _dump(mutate_tree(rng, yaml.safe_load(data))).encode()


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Change the text of a file that holds no tree of plain values."""
    return rng.choice((mutate_bytes, mutate_lines, mutate_lines))(rng, data)


# --- tensors


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Drop, add, rename, reshape, cut, convert or spoil a tensor, or edit header and bytes."""
    chance = rng.random()
    if chance < 0.15:
        return mutate_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    if chance < 0.25:
        size = rng.choice((0, 1, length - 1, length + 8, 2**31, 2**62, 2**64 - 1))
        return size.to_bytes(8, "little") + data[8:]
    if chance < 0.5:
        header = _dump(mutate_tree(rng, json.loads(data[8 : 8 + length]))).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return save(mutate_tensors(rng, load(data)))


def mutate_tensors(rng: random.Random, tensors: dict[str, Any]) -> dict[str, Any]:
    """Drop, add, rename, reshape, cut, convert or spoil one of some named tensors."""
    import torch

    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changed = {
        "reshape": lambda: tensor.reshape(-1),
        "turn": lambda: tensor.t() if tensor.dim() == 2 else tensor.unsqueeze(0),
        "cut": lambda: tensor[:-1] if tensor.dim() else tensor.reshape(1),
        "empty": lambda: torch.zeros(0),
        "scalar": lambda: torch.tensor(1.0),
        "grow": lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor.reshape(1),
        "nan": lambda: (
            torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
        ),
        "inf": lambda: torch.full(tensor.shape, float("inf")),
        "huge": lambda: torch.full(tensor.shape, 1e38),
        "half": lambda: tensor.half(),
        "whole": lambda: tensor.long(),
        "bool": lambda: tensor.bool(),
        "double": lambda: tensor.double(),
    }
    what = rng.choice(("drop", "add", "rename", *changed))
    if what == "add":
        tensors |= {name: tensor, rng.choice((f"{name}.A", "x", "")): tensor.clone()}
    elif what == "rename":
        tensors[rng.choice((name[:-1], name + "x", f"module.{name}"))] = tensor
    elif what != "drop":
        tensors[name] = changed[what]().contiguous()
    return tensors


def mutate_pickled(rng: random.Random, data: bytes) -> bytes:
    """Change one tensor of a torch file, what holds the tensors, or the bytes."""
    import io

    import torch

    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    content = torch.load(io.BytesIO(data), weights_only=True)
    content = mutate_tensors(rng, content) if rng.random() < 0.7 else mutate_tree(rng, {**content})
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# --- files

BY_SUFFIX: dict[str, Bytes] = {
    ".json": mutate_json,
    ".jsonl": mutate_jsonl,
    ".yaml": mutate_yaml,
    ".safetensors": mutate_safetensors,
    ".pt": mutate_pickled,
    ".bin": mutate_pickled,
    ".txt": mutate_lines,
    "": mutate_json,
}


def mutate_file(rng: random.Random, file: Path, others: list[Path]) -> str:
    """Damage a file in its place; the name of what was done."""
    chance = rng.random()
    if chance < 0.03:
        file.unlink()
        return "missing"
    if chance < 0.05:
        file.unlink()
        file.mkdir()
        return "a folder"
    if chance < 0.08:
        shutil.copyfile(rng.choice(others), other := file.with_name("other"))
        other.replace(file)
        return "another file"
    mutate = BY_SUFFIX.get(file.suffix, mutate_bytes)
    data = file.read_bytes()
    if not data.strip() or file.name == "templates.yaml":
        mutate = mutate_text
    file.write_bytes(mutate(rng, data))
    return mutate.__name__
