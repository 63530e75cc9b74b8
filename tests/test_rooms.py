"""The rooms of the package: what may be imported from outside, and where families are at home."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from processes import ROOT

PACKAGE = ROOT / "mhr_scale"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(file.parent for file in PACKAGE.rglob("__init__.py") if file.parent != PACKAGE)
#: What belongs to one architecture: model types, classes and modules, names in configurations.
ONE_ARCHITECTURE = re.compile(
    r"\b(m?t5|llama|mistral|qwen\d?|gemma\d?|gpt\w*|bert)\b|ByT5|\bM?T5[A-Z]\w*"
    r"|\b(d_model|d_kv|d_ff|num_layers|num_decoder_layers|num_heads|hidden_size)\b"
    r"|decoder_start_token_id|decoder_input_ids|decoder_attention_mask|is_encoder_decoder"
    r"|lm_head|shared\.weight|encoder\.block|decoder\.block|embed_tokens|get_encoder"
    r"|SEQ_2_SEQ_LM|CAUSAL_LM|Seq2SeqLM|ForCausalLM|\bwi_[01]\b|DenseReluDense|EncDecAttention"
)


def listed(room: Path) -> set[str]:
    """The files that a room's docstring offers to other rooms."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    offer = re.search(r"Other rooms import: ([^.]*)\.", text)
    return set(re.split(r",\s+", offer[1])) if offer else set()


def room_imports() -> set[tuple[str, str, str]]:
    """Who imports which file of which other room."""
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mhr_scale."):
                steps = (node.module or "").split(".")[1:]
                for name in node.names:
                    path = PACKAGE.joinpath(*steps, name.name)
                    target = path if path.with_suffix(".py").exists() else PACKAGE.joinpath(*steps)
                    if target.is_dir() or target.parent in (file.parent, PACKAGE):
                        continue
                    room = str(target.parent.relative_to(PACKAGE))
                    found.add((str(file.relative_to(PACKAGE)), room, target.name))
    return found


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE)))
def test_a_room_says_what_it_is_for_and_offers_files_that_it_has(room):
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert text
    assert text.partition("\n")[0].endswith((".", ";"))
    assert listed(room) <= {file.stem for file in room.glob("*.py")}


def test_rooms_import_from_each_other_what_is_offered_and_offer_what_is_imported():
    imports = room_imports()
    wanted = {(room, name) for _, room, name in imports}
    offered = {(str(room.relative_to(PACKAGE)), name) for room in ROOMS for name in listed(room)}
    assert wanted - offered == set()
    assert offered - wanted == set()


def code_lines(file: Path) -> dict[int, str]:
    """The lines of a file without comments and docstrings, by number."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            lines[number - 1] = lines[number - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            for number in range(node.lineno, node.end_lineno + 1):
                lines[number - 1] = ""
    return dict(enumerate(lines, 1))


def test_what_is_special_about_one_architecture_stands_in_families():
    outside = [file for file in FILES if PACKAGE / "families" not in file.parents]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in outside
        for number, line in code_lines(file).items()
        if ONE_ARCHITECTURE.search(line)
    ]
    assert found == []
