"""The verb `data` as a user runs it."""

import json
import re
from pathlib import Path

import pytest
from fast_tokenizers import TEMPLATE, make_tokenizer
from processes import ROOT

from mhr_scale.config import PretrainConfig
from mhr_scale.errors import DataError
from mhr_scale.recipe.reading import load
from mhr_scale.tasks.toy import compose
from mhr_scale.verbs.data import check_data

TOY = str(ROOT / "launch" / "recipes" / "toy.yaml")


def check(*overrides: str) -> None:
    check_data(load(PretrainConfig, TOY, overrides))


def write_rows(folder: Path, good: int, bad: int) -> str:
    folder.mkdir()
    rows = [json.dumps({"input": f"a {n}", "target": "b"}) for n in range(good)]
    (folder / "train.jsonl").write_text("\n".join([*rows, *['{"input": 3}'] * bad]) + "\n")
    return f"tasks={{suite: jsonl, folder: {folder.parent}}}"


def shown(out: str) -> list[str]:
    """The rows in words below the table."""
    lines = out.splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("row ")) :]


def test_every_task_has_a_line_and_the_totals_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    check("tasks.n_tasks=5", "tasks.train_examples=7", "tasks.validation_examples=2")
    head, *lines, total = capsys.readouterr().out.splitlines()[:7]
    assert head.split()[:4] == ["task", "metric", "train", "held"]
    assert [line.split()[1:4] for line in lines] == [["exact_match", "7", "2"]] * 5
    assert total.split()[:3] == ["total", "35", "10"]


def test_three_rows_are_shown_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    check("tasks.n_tasks=5", "tasks.instruction=full")
    lines = shown(capsys.readouterr().out)
    heads, read, trained = lines[::3], lines[1::3], lines[2::3]
    assert len(lines) == 9
    names = [
        re.fullmatch(r"row 1 of (\S+): (\d+) tokens are read, (\d+) are trained", head)
        for head in heads
    ]
    for name, words, target in zip(names, read, trained, strict=True):
        assert name is not None
        operation, mapping, layout = name[1].split(".")
        asked = f"  read:    op:{operation} map:{mapping} fmt:{layout} "
        assert words.startswith(asked)
        assert words.endswith(" </s>")
        assert target.startswith("  trained: ")
        symbols = words.removeprefix(asked).removesuffix(" </s>")
        assert target == f"  trained: {compose(name[1], symbols)} </s>"
        assert int(name[2]) == len(words.split()) - 1
        assert int(name[3]) == len(target.split()) - 1
    check("tasks.n_tasks=5", "tasks.instruction=full")
    assert shown(capsys.readouterr().out) == lines


def test_fewer_tasks_show_more_of_their_rows(capsys: pytest.CaptureFixture[str]) -> None:
    for n_tasks, rows, expected in ((1, 5, [1, 2, 3]), (2, 5, [1, 2, 1]), (1, 2, [1, 2])):
        check(f"tasks.n_tasks={n_tasks}", f"tasks.train_examples={rows}")
        numbers = [line.split()[1] for line in shown(capsys.readouterr().out)[::3]]
        assert numbers == [str(number) for number in expected]


def test_where_rows_are_cut_is_marked_also_from_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows" / "t").mkdir(parents=True)
    row = {"input": "abcdefghij", "target": "klmnop"}
    (tmp_path / "rows" / "t" / "train.jsonl").write_text(json.dumps(row) + "\n")
    byt5 = "backbone={config: {d_model: 8, d_kv: 4, d_ff: 8, num_layers: 1, num_heads: 2, "
    recipe = [f"tasks={{suite: jsonl, folder: {tmp_path / 'rows'}}}", byt5 + "vocab_size: 384}}"]
    recipe += ["batch.max_input_tokens=6", "batch.max_target_tokens=3", "batch.cut=middle"]
    texts = []
    for cache in ("null", tmp_path / "cache", tmp_path / "cache"):
        check(*recipe, f"run.token_cache={cache}")
        texts.append(shown(capsys.readouterr().out))
    assert texts == [texts[0]] * 3
    assert texts[0] == [
        "row 1 of t: 6 tokens are read, 3 are trained",
        "  read:    abc [... cut ...] ij</s>",
        "  trained: kl [... cut ...] </s>",
    ]


def test_conversations_are_shown_as_their_template_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows" / "t").mkdir(parents=True)
    turns = [("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "rows" / "t" / "train.jsonl").write_text(json.dumps(row) + "\n")
    check(
        f"tasks={{suite: jsonl, folder: {tmp_path / 'rows'}, chat: true, system: S}}",
        "batch.max_input_tokens=100",
        "backbone={config: {model_type: llama, vocab_size: 384, hidden_size: 8, "
        "intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2, "
        f"bos_token_id: 0}}, tokenizer: {tmp_path / 'tokenizer'}}}",
    )
    lines = shown(capsys.readouterr().out)
    first = "<bos><system>S<eos>\\n<user>a<eos>\\n<assistant>"
    second = f"{first}A<eos>\\n<user>b<eos>\\n<assistant>"
    assert lines[1::3] == [f"  read:    {first}", f"  read:    {second}"]
    assert lines[2::3] == ["  trained: A<eos>", "  trained: B<eos>"]


def test_cut_shares_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    check("tasks.n_tasks=1", "batch.max_input_tokens=2")
    assert "100.0%" in capsys.readouterr().out


def test_refused_rows_are_listed_with_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(write_rows(tmp_path / "t", good=20, bad=2))
    out = capsys.readouterr().out
    assert "train.jsonl:21: " in out
    assert "train.jsonl:22: " in out


def test_data_that_would_stop_a_run_is_an_error_below_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"^12 of 32 rows refused, more than on_bad: reject allows"):
        check(write_rows(tmp_path / "t", good=20, bad=12))
    assert "train.jsonl:21: " in capsys.readouterr().out


def test_the_strict_policy_counts_every_refused_row(tmp_path: Path) -> None:
    settings = write_rows(tmp_path / "t", good=20, bad=1)
    with pytest.raises(DataError, match=r"^1 of 21 rows refused, more than on_bad: error allows"):
        check(settings, "tasks.intake.on_bad=error")


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        check(f"tasks={{suite: jsonl, folder: {tmp_path / 'none'}}}")


def test_no_cache_is_begun_for_a_folder_that_is_not_there(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tasks = f"tasks={{suite: jsonl, folder: {tmp_path / 'none'}}}"
    with pytest.raises(DataError, match=r"tasks\.folder: no folder '.*none'"):
        check(tasks, f"run.token_cache={cache}")
    assert not cache.exists()


def test_the_cache_is_filled_for_later_runs(tmp_path: Path) -> None:
    check("tasks.n_tasks=2", f"run.token_cache={tmp_path / 'cache'}")
    assert len(list(tmp_path.glob("cache/*/manifest.json"))) == 1
