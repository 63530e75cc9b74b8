"""Templates that would never end, or make gigabytes of a row."""

import resource
import signal

import pytest
from film_templates import write
from held_out_files import RTE, configure, template, write_rows, write_templates

from mhr_scale.errors import DataError
from mhr_scale.tasks.t0 import bounds
from mhr_scale.tasks.t0.bounds import UnboundedTemplateError
from mhr_scale.tasks.t0.prompts import Prompter, Template, load_templates
from mhr_scale.tasks.task import Intake

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x=f) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
NESTING = (
    "{% set ns = namespace(x=f) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}"
)


@pytest.fixture(autouse=True)
def low_bounds(monkeypatch):
    monkeypatch.setattr(bounds, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(bounds, "MOST_BYTES", 2**28)


def limits():
    return resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_VIRTUAL)


def render(jinja, row, choices=None):
    made = Template(
        name="t",
        dataset="films",
        subset=None,
        jinja=jinja,
        answer_choices=choices,
        is_original_task=True,
        metrics=(),
        id="1",
    )
    return Prompter(max_characters=None).render(made, row, row_id="7")


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (ENDLESS, "it takes more than 0.2 seconds"),
        (NESTING, "it takes more than"),
        ("{{ 9 ** (9 ** 9) }}", "it takes more than 0.2 seconds"),
        (DOUBLING, "it takes more than 0.25 GiB of memory"),
        ("{{ f.center(2000000000) }}", "it takes more than 0.25 GiB of memory"),
        ("{{ f | center(2000000000) }}", "it takes more than 0.25 GiB of memory"),
        ("{{ [f] | batch(2000000000, f) | list }}", "it takes more than 0.25 GiB of memory"),
        (
            "{% for i in range(9999) %}{{ f * 2000 }}{% endfor %}",
            "it makes 1[0-9]{7} characters of one row, more than 10000000",
        ),
    ],
)
def test_what_a_template_takes_is_bounded(jinja, message):
    before = limits()
    for text, choices in ((f"{jinja} ||| y", None), ("x ||| y", jinja)):
        with pytest.raises(
            UnboundedTemplateError,
            match=f"^films: template 't' cannot render row 7: {message}.*; leave the template out$",
        ):
            render(text, {"f": "x"}, choices)
    assert limits() == before
    assert render("{{ f }} ||| y", {"f": "x"}).input == "x"


@pytest.mark.parametrize("jinja", ["{{ (9 ** (9 ** 9)) }}", "{{ 'x' | center(2000000000) }}"])
def test_a_constant_of_a_template_is_bounded_as_it_is_compiled(tmp_path, jinja):
    """Jinja may work out constants before any row is there."""
    write(tmp_path, second=f"{jinja} ||| {{{{ text }}}}")

    def load_and_render():
        (author, _) = load_templates(tmp_path, "films", None)
        Prompter().render(author, {"text": "x", "label": 1}, row_id="7")

    with pytest.raises(DataError, match=r"template 'author'.* it takes more than"):
        load_and_render()


def test_a_template_that_nests_too_deeply_is_named(tmp_path):
    write(tmp_path, second="{{ " + "(" * 3000 + "1" + ")" * 3000 + " }} ||| x")
    with pytest.raises(DataError, match="template 'author': 'jinja' cannot be compiled: max"):
        load_templates(tmp_path, "films", None)


def test_a_template_that_never_ends_stops_the_reading_instead_of_costing_every_row(tmp_path):
    write_templates(
        tmp_path, "super_glue", "rte", template("a", f"{ENDLESS}{{{{ premise }}}} ||| no")
    )
    write_rows(tmp_path / "rte.validation.jsonl", *({**RTE, "idx": n} for n in range(30)))
    suite = configure(tmp_path, tasks=("rte",))
    with pytest.raises(UnboundedTemplateError, match="template 'a' cannot render row rte/0: it"):
        suite.read_tasks(Intake(on_bad="skip"))
