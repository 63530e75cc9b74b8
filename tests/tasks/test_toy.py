"""The toy suite: compositions, the tasks made of them, which are held out, and choices."""

from collections import Counter
from dataclasses import replace

import pytest
from toy_tasks import CONFIG, everything, examples_of

from mhr_scale.config import ToyTasks
from mhr_scale.errors import DataError
from mhr_scale.tasks import toy

SEEDS = range(20)


def parts_of(tasks):
    return [tuple(task.name.split(".")) for task in tasks]


def n_changed(name, other):
    return sum(a != b for a, b in zip(name.split("."), other.split(".")))


# --- compositions


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("copy", "c a f b e"),
        ("reverse", "e b f a c"),
        ("rotate_left", "a f b e c"),
        ("rotate_right", "e c a f b"),
        ("tail", "a f b e"),
        ("init", "c a f b"),
        ("sort", "a b c e f"),
        ("every_second", "c f e"),
    ],
)
def test_an_operation_rearranges_the_letters(operation, expected):
    assert toy.compose(f"{operation}.identity.plain", "c a f b e") == expected


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ("identity", "a b f l"),
        ("plus1", "b c g a"),
        ("minus1", "l a e k"),
        ("mirror", "l k g a"),
        ("swap", "b a e k"),
        ("plus4", "e f j d"),
    ],
)
def test_a_map_replaces_each_letter(mapping, expected):
    assert toy.compose(f"copy.{mapping}.plain", "a b f l") == expected


@pytest.mark.parametrize(
    ("layout", "expected"), [("plain", "a b c d"), ("before", "< a b c d"), ("after", "a b c d >")]
)
def test_a_format_sets_a_marker(layout, expected):
    assert toy.compose(f"copy.identity.{layout}", "a b c d") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sort.mirror.before", "< l j g a"),
        ("sort.plus1.plain", "b d g a"),
        ("every_second.swap.after", "d b >"),
    ],
)
def test_the_operation_comes_first_then_the_map_then_the_format(name, expected):
    assert toy.compose(name, "c l a f") == expected


def test_no_two_compositions_do_the_same():
    symbols = ("c a f b h e", "l k a d c", "b g g i a d e")
    answers = [tuple(toy.compose(name, s) for s in symbols) for name in toy.PARTS]
    assert len(set(answers)) == 144


def test_a_misspelt_composition_is_met_with_the_right_name():
    with pytest.raises(DataError, match=r"did you mean 'reverse\.plus1\.plain'"):
        toy.compose("revers.plus1.plain", "a b c d")


def test_a_foreign_letter_is_refused():
    with pytest.raises(DataError, match="'m' is not one of the letters"):
        toy.compose("copy.plus1.plain", "a b m d")


# --- tasks


def test_a_target_is_its_tasks_composition_of_its_input():
    assert all(
        example.targets == (toy.compose(task.name, example.input),)
        for task in everything()
        for example in examples_of(task)
    )


def test_inputs_are_four_to_seven_letters():
    lengths = Counter(len(e.input.split()) for t in everything() for e in examples_of(t))
    assert sorted(lengths) == [4, 5, 6, 7]


def test_training_tasks_have_as_many_examples_as_asked():
    sizes = {(len(t.train), len(t.validation), len(t.test)) for t in toy.make_tasks(CONFIG)}
    assert sizes == {(30, 10, 0)}


def test_held_out_tasks_have_training_and_test_examples():
    sizes = {(len(t.train), len(t.validation), len(t.test)) for t in toy.held_out_tasks(CONFIG)}
    assert sizes == {(30, 0, 100)}


def test_tasks_are_measured_by_exact_match():
    assert {task.metric for task in everything()} == {"exact_match"}


def test_the_full_instruction_names_the_three_primitives_before_the_string():
    bare = toy.make_tasks(CONFIG)[0]
    operation, mapping, layout = bare.name.split(".")
    told = toy.make_tasks(replace(CONFIG, instruction="full"))[0]
    words = f"op:{operation} map:{mapping} fmt:{layout}"
    assert [e.input for e in told.train] == [f"{words} {e.input}" for e in bare.train]


def test_the_same_config_gives_the_same_tasks():
    assert everything() == everything()


def test_another_seed_gives_other_strings():
    assert everything() != everything(replace(CONFIG, seed=1))


def test_another_seed_holds_out_other_tasks():
    other = toy.held_out_tasks(replace(CONFIG, seed=1))
    assert set(parts_of(toy.held_out_tasks(CONFIG))) != set(parts_of(other))


def test_the_examples_of_a_seed_stay_what_they_were():
    example = toy.make_tasks(ToyTasks(suite="toy"))[0].train[0]
    assert (example.id, example.input) == ("rotate_left.mirror.plain:train:0", "h c d k b b")


def test_more_tasks_begin_with_the_same_tasks():
    assert toy.make_tasks(replace(CONFIG, n_tasks=30))[:20] == toy.make_tasks(CONFIG)


def test_held_out_tasks_do_not_depend_on_the_number_of_training_tasks():
    assert toy.held_out_tasks(replace(CONFIG, n_tasks=8)) == toy.held_out_tasks(CONFIG)


def test_the_test_fold_does_not_depend_on_the_number_of_training_examples():
    fewer = toy.held_out_tasks(replace(CONFIG, train_examples=5))
    assert [t.test for t in fewer] == [t.test for t in toy.held_out_tasks(CONFIG)]


def test_ids_are_unique_within_a_task():
    assert all(
        len({e.id for e in examples_of(task)}) == len(examples_of(task)) for task in everything()
    )


def test_no_string_occurs_twice_in_a_task():
    tasks = everything(replace(CONFIG, train_examples=2000, validation_examples=500, n_tasks=2))
    assert all(
        len({e.input for e in examples_of(task)}) == len(examples_of(task)) for task in tasks
    )


def test_a_repeated_draw_is_drawn_again(monkeypatch):
    monkeypatch.setattr(toy, "LONGEST", 4)
    monkeypatch.setattr(toy, "LETTERS", "ab")
    (task,) = toy.make_tasks(replace(CONFIG, n_tasks=1, train_examples=8, validation_examples=8))
    assert len({e.input for e in examples_of(task)}) == 16


def test_training_and_held_out_tasks_share_no_composition():
    config = replace(CONFIG, n_tasks=134, train_examples=1, validation_examples=0)
    assert len({task.name for task in everything(config)}) == 144


@pytest.mark.parametrize("n_tasks", [135, 0])
def test_a_number_of_tasks_outside_the_limits_is_refused_with_the_limit(n_tasks):
    with pytest.raises(DataError, match=rf"{n_tasks} is not in 1\.\.134"):
        toy.make_tasks(replace(CONFIG, n_tasks=n_tasks))


def test_named_tasks_take_the_place_of_the_split():
    names = ("reverse.mirror.after", "copy.plus1.plain")
    for fold, make in (("train", toy.make_tasks), ("held_out", toy.held_out_tasks)):
        config = replace(CONFIG, fold=fold, tasks=names)
        assert tuple(task.name for task in make(config)) == names


def test_a_named_task_has_the_examples_it_has_among_the_others():
    task = toy.make_tasks(CONFIG)[3]
    [alone] = toy.make_tasks(replace(CONFIG, tasks=(task.name,)))
    assert alone == task


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("reverse.miror.after",), r"named 'reverse.miror.after'; did you mean"),
        (("copy.plus1.plain", "copy.plus1.plain"), r"'copy.plus1.plain' stands twice"),
    ],
)
def test_unknown_and_repeated_names_of_tasks_are_errors(names, match):
    with pytest.raises(DataError, match=match):
        toy.make_tasks(replace(CONFIG, tasks=names))


def test_a_code_tells_tasks_apart_and_describes_another_one():
    names = tuple(toy.PARTS)
    few = {"tasks": names, "train_examples": 1, "validation_examples": 0}
    codes, descriptions = (
        {
            task.name: task.train[0].input.split()[:3]
            for task in toy.make_tasks(replace(CONFIG, **few, instruction=instruction))
        }
        for instruction in ("code", "full")
    )
    assert len({tuple(code) for code in codes.values()}) == len(names)
    assert sorted(codes.values()) == sorted(descriptions.values())
    assert not [name for name in names if codes[name] == descriptions[name]]


def test_a_code_changes_nothing_but_the_first_three_words():
    plain = toy.make_tasks(CONFIG)[0].train
    coded = toy.make_tasks(replace(CONFIG, instruction="code"))[0].train
    assert [row.input.split()[3:] for row in coded] == [row.input.split() for row in plain]
    assert [row.targets for row in coded] == [row.targets for row in plain]


# --- the held-out split


def test_held_out_tasks_of_any_seed_have_six_operations_and_no_primitive_too_often():
    for seed in SEEDS:
        parts = parts_of(toy.held_out_tasks(replace(CONFIG, seed=seed, train_examples=1)))
        most = [max(Counter(part).values()) for part in zip(*parts, strict=True)]
        assert all(n <= limit for n, limit in zip(most, (2, 3, 4), strict=True)), (seed, most)
        assert len({operation for operation, _, _ in parts}) >= 6, seed


def test_eight_training_tasks_of_any_seed_show_every_primitive():
    for seed in SEEDS:
        tasks = toy.make_tasks(replace(CONFIG, seed=seed, n_tasks=8))
        shown = {primitive for parts in parts_of(tasks) for primitive in parts}
        assert shown == {*toy.OPERATIONS, *toy.MAPS, *toy.FORMATS}, seed


# --- choices


def test_an_example_has_five_different_choices():
    assert all(len(set(e.choices)) == 5 for t in everything() for e in examples_of(t))


def test_the_label_points_at_the_target():
    assert all(e.choices[e.label] == e.targets[0] for t in everything() for e in examples_of(t))


def test_every_choice_is_another_composition_of_the_same_string():
    assert all(
        set(e.choices) <= {toy.compose(name, e.input) for name in toy.PARTS}
        for t in everything()
        for e in t.train[:5]
    )


def test_at_least_half_of_the_distractors_change_one_primitive_only():
    for task in everything():
        near = [name for name in toy.PARTS if n_changed(name, task.name) == 1]
        for example in task.train[:5]:
            answers = {toy.compose(name, example.input) for name in near}
            assert len(answers & set(example.choices)) >= 2


def test_the_right_choice_is_at_every_position_about_as_often():
    labels = Counter(e.label for t in everything() for e in examples_of(t))
    assert all(0.17 < labels[position] / labels.total() < 0.23 for position in range(5))
