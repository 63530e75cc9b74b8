"""Inputs in a chat template: whole, cut, conversations, and what templates refuse."""

from pathlib import Path
from typing import Any

import pytest
from fast_tokenizers import TEMPLATE, make_tokenizer
from transformers import AutoTokenizer

from mhr_scale.config import BatchConfig, JsonlTasks, SuperNITasks, ToyTasks
from mhr_scale.errors import ConfigError, DataError
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.t5 import GATED, make_byte_tokenizer
from mhr_scale.rows.encode import Cuts, Encoder, Gaps
from mhr_scale.rows.tokens import describe, open_tokens
from mhr_scale.tasks.suites import open_suite, read_evaluation
from mhr_scale.tasks.task import Chat, Example, Place, Task, Turn

TOKENIZER = make_tokenizer(chat_template=TEMPLATE)
ASKED = Example(id="x", input="What? Out: ", targets=("yes",))
TALK = Example(
    id="y",
    input="cdefgh",
    targets=("no",),
    history=(Turn(role="user", content="ab"), Turn(role="assistant", content="AB")),
    place=Place(file="talk.jsonl", line=3),
)


def encoder(
    *rows: Example,
    tokenizer: Any = TOKENIZER,
    system: str | None = None,
    suffix: str = "",
    **lengths: Any,
) -> Encoder:
    task = Task(name="t", train=rows, suffix=suffix, chat=Chat(system=system))
    return Encoder(task, tokenizer, BatchConfig(**lengths), CAUSAL)


def text(row: Example, **settings: Any) -> str:
    (ids,) = encoder(row, **settings).inputs([row])
    return str(TOKENIZER.decode(ids.tolist()))


def messages(row: Example, system: str | None = None) -> list[dict[str, str]]:
    turns = [("system", system)] if system else []
    turns += [(turn.role, turn.content) for turn in row.history]
    return [{"role": r, "content": c} for r, c in [*turns, (row.role, row.input)]]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("row", [ASKED, TALK])
def test_rows_are_what_the_real_template_makes(
    shared: Path, row: Example, system: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "backbones" / "smollm2_135m")
    (made,) = encoder(row, tokenizer=tokenizer, system=system).rows([row])
    expected = tokenizer.apply_chat_template(
        messages(row, system), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert made.input_ids.tolist() == expected
    assert made.answers[0].tolist()[-1] == tokenizer.eos_token_id


def test_the_template_begins_the_text_and_nothing_else_does() -> None:
    assert text(ASKED) == "<bos><user>What? Out:<eos>\n<assistant>"
    assert text(TALK, system="S") == (
        "<bos><system>S<eos>\n<user>ab<eos>\n<assistant>AB<eos>\n<user>cdefgh<eos>\n<assistant>"
    )


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    dated = "{%- set day = strftime_now('%d %b %Y') -%}On {{ day }}: " + TEMPLATE
    made = text(ASKED, tokenizer=make_tokenizer(chat_template=dated))
    assert made == "On 26 Jul 2024: <bos><user>What? Out:<eos>\n<assistant>"


def test_a_conversations_own_system_text_is_stronger() -> None:
    own = Example(id="x", input="a", targets=("b",), history=(Turn(role="system", content="O"),))
    assert text(own, system="S").startswith("<bos><system>O<eos>\n<user>a")


#: Tokens of the template around one turn of the user.
AROUND = len(TOKENIZER("<bos><user><eos>\n<assistant>", add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    ("cut", "kept"),
    [(None, "fghij"), ("left", "fghij"), ("right", "abcde"), ("middle", "abcij")],
)
def test_only_what_is_said_is_cut(cut: str | None, kept: str) -> None:
    long = Example(id="x", input="abcdefghij", targets=("b",))
    assert (
        text(long, max_input_tokens=AROUND + 5, cut=cut) == f"<bos><user>{kept}<eos>\n<assistant>"
    )


def test_a_suffix_survives_in_a_template_that_strips_texts() -> None:
    long = Example(id="x", input="abcdefghij Out: ", targets=("b",))
    made = text(long, max_input_tokens=AROUND + 7, suffix=" Out: ")
    assert made == "<bos><user>ij Out:<eos>\n<assistant>"


@pytest.mark.parametrize(
    ("most", "cut", "said"),
    [
        (7, "left", ("", "B", "cdefgh")),
        (5, "left", ("", "", "defgh")),
        (3, "right", ("ab", "A", "")),
        (5, "middle", ("ab", "A", "gh")),
        (0, "left", ("", "", "")),
    ],
)
def test_a_conversation_is_cut_as_if_its_turns_were_one_text(
    most: int, cut: str, said: tuple[str, str, str]
) -> None:
    frame = "<bos><system>S<eos>\n<user>{}<eos>\n<assistant>{}<eos>\n<user>{}<eos>\n<assistant>"
    around = len(TOKENIZER(frame.format("", "", ""), add_special_tokens=False).input_ids)
    made = text(TALK, system="S", max_input_tokens=around + most, cut=cut)
    assert made == frame.format(*said)


def test_where_rows_are_cut_is_told() -> None:
    rows = [Example(id="x", input="abcdefghij", targets=("abcdef",)), ASKED, TALK, TALK]
    lengths = {"max_input_tokens": AROUND + 5, "max_target_tokens": 4, "cut": "middle"}
    made = encoder(*rows[:1], **lengths)
    made.rows(rows[:1])
    assert made.first_gaps == [Gaps(input=1 + len("<user>abc"), target=3)]
    assert made.cuts == Cuts(rows=1, inputs=1, targets=1)
    whole = encoder(*rows)
    whole.rows(rows)
    assert whole.first_gaps == [Gaps()] * 3


def test_a_template_longer_than_the_limit_is_an_error_at_the_rows_place() -> None:
    with pytest.raises(DataError) as caught:
        text(TALK, max_input_tokens=20)
    assert str(caught.value).startswith(
        "talk.jsonl:3: max_input_tokens 20 is below the 41 tokens of its chat template and system"
    )


# -- refusals --------------------------------------------------------------------------------------


def with_template(template: str | None) -> Any:
    return make_tokenizer(chat_template=template)


@pytest.mark.parametrize("tokenizer", [with_template(None), make_byte_tokenizer()])
def test_a_tokenizer_without_a_template_is_refused_at_once(tokenizer: Any, tmp_path: Path) -> None:
    expected = r"^tasks\.chat: true, but the tokenizer has no chat template; set tasks\.chat: false"
    for family in (CAUSAL, GATED):
        for cache in (None, str(tmp_path / "cache")):
            with pytest.raises(ConfigError, match=expected):
                open_tokens(
                    ToyTasks(suite="toy", chat=True, n_tasks=1),
                    tokenizer,
                    BatchConfig(),
                    family,
                    cache=cache,
                )
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=expected):
        encoder(ASKED, tokenizer=tokenizer)


def test_an_encoder_decoder_with_a_template_gets_its_text_and_no_more() -> None:
    task = Task(name="t", train=(ASKED,), chat=Chat())
    (row,) = Encoder(task, TOKENIZER, BatchConfig(), GATED).rows(task.train)
    assert TOKENIZER.decode(row.input_ids.tolist()) == "<bos><user>What? Out:<eos>\n<assistant>"


@pytest.mark.parametrize(
    ("template", "system", "expected"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            "S",
            "tasks.system: the tokenizer's chat template refuses it (System role not supported)",
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "S",
            "tasks.system: the tokenizer's chat template leaves out what the system says; leave "
            "the setting out",
        ),
        (
            "nothing",
            None,
            "tasks.chat: the tokenizer's chat template leaves out what the user says; leave the "
            "setting out",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    template: str, system: str | None, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        encoder(ASKED, tokenizer=with_template(template), system=system)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (
            "{% if m.role == 'assistant' %}{{ raise_exception('no talk') }}{% endif %}"
            "{{ m.content }}",
            "talk.jsonl:3: the chat template refuses it: no talk; mend the row or leave it out",
        ),
        (
            "{% if loop.last %}{{ m.content }}{% endif %}",
            "talk.jsonl:3: the chat template leaves out what the user says: 'ab'; mend the row or "
            "leave it out",
        ),
    ],
)
def test_a_row_that_a_template_cannot_show_is_an_error_at_its_place(
    loop: str, expected: str
) -> None:
    template = f"{{% for m in messages %}}{loop}{{% endfor %}}"
    with pytest.raises(DataError) as caught:
        encoder(TALK, tokenizer=with_template(template)).inputs([TALK])
    assert str(caught.value) == expected


def test_what_an_assistant_thought_may_be_left_out_and_the_row_still_be_cut() -> None:
    """As Qwen3's template leaves out thoughts of turns before the last."""
    template = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
    thought = (Turn(role="user", content="ab"), Turn(role="assistant", content="hm</think>AB"))
    row = Example(id="x", input="cdefgh", targets=("b",), history=thought)
    (ids,) = encoder(row, tokenizer=with_template(template), max_input_tokens=49).inputs([row])
    assert TOKENIZER.decode(ids.tolist()) == (
        "<bos><user><eos>\n<assistant>AB<eos>\n<user>cdefgh<eos>\n<assistant>"
    )


# -- settings --------------------------------------------------------------------------------------


def test_every_way_to_read_a_suite_says_that_its_tasks_are_chats() -> None:
    suite = ToyTasks(suite="toy", chat=True, system="S", n_tasks=1, train_examples=2)
    (trained,) = open_suite(suite).tasks
    (evaluated,), _ = read_evaluation(suite, examples=None)
    assert trained.chat == evaluated.chat == Chat(system="S")
    (plain,) = open_suite(ToyTasks(suite="toy", n_tasks=1, train_examples=2)).tasks
    assert plain.chat is None


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: ToyTasks(suite="toy", **more),
        lambda **more: JsonlTasks(suite="jsonl", folder="f", **more),
        lambda **more: SuperNITasks(suite="superni", folder="f", **more),
    ],
)
def test_a_system_text_that_nobody_reads_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"^tasks\.system: only tasks\.chat: true has a system$"):
        make(system="S")
    with pytest.raises(ConfigError, match=r"^tasks\.system: empty; leave it out$"):
        make(system=" ", chat=True)


def test_a_cache_is_of_one_template_one_system_text_and_one_cut() -> None:
    other = with_template(TEMPLATE + " ")
    suites = [ToyTasks(suite="toy", chat=True, system=text) for text in (None, "S")]
    suites += [ToyTasks(suite="toy")]
    cuts = [BatchConfig(cut=cut) for cut in (None, "left", "right", "middle")]  # type: ignore[arg-type]
    keys = [describe(suite, TOKENIZER, BatchConfig(), CAUSAL) for suite in suites]
    keys += [describe(suites[0], other, BatchConfig(), CAUSAL)]
    keys += [describe(suites[0], TOKENIZER, cut, CAUSAL) for cut in cuts[2:]]
    assert all(key not in keys[:number] for number, key in enumerate(keys))
    same = [describe(suites[0], TOKENIZER, cut, CAUSAL) for cut in cuts[:2]]
    assert same[0] == same[1] == keys[0]
