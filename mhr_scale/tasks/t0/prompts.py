"""Prompts from promptsource's template files, rendered as its release 0.2.3 renders them.

A template is one Jinja text, `<input> ||| <target>`, that sees the fields of a row and, where its
`answer_choices` says so, the choices a model may answer with. For the templates of T0 the texts are
those of promptsource; where the two differ, this engine is the stricter one:

* Templates are code of strangers: they run in Jinja's immutable sandbox, nothing is included or
  imported, and time and memory are bounded (`bounds`).
* A field that the row does not have is an error instead of an empty text. What a field does not
  have (an item of an empty list, a key of an object) still renders empty.
* `choice` and `random` draw from the seed, the template's id and the row's id alone, so that a
  render is a pure function.
* `|||` inside a row never splits a text, also in lists, objects and answer choices.
* A hyphen in the name of a field becomes an underscore (`label-coarse` of trec), as in the scripts
  that made P3.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing

from mhr_scale.errors import DataError, did_you_mean
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.t0.bounds import UnboundedTemplateError, bounded, check_length

FILE = "templates.yaml"
SEPARATOR = "|||"
# Stands for a separator inside a row; a code point that no text may hold, and one character long,
# so that no cut leaves a half of it.
HIDDEN_SEPARATOR = "\ufdd0"
# Name of the draws among a render's variables; the space keeps it out of a template's reach.
DRAWS = " draws"
NO_INPUT, NO_LABEL = "<NO INPUT>", "<NO LABEL>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One template of a data set; `id` is its identity over releases, `name` the one people use.

    `is_original_task` tells templates of the task the data set was made for from those that turn
    it round (a question from its answer); T0 is evaluated on the former alone.
    """

    name: str
    dataset: str
    subset: str | None
    jinja: str
    answer_choices: str | None
    is_original_task: bool
    metrics: tuple[str, ...]
    id: str

    @property
    def config_name(self) -> str:
        """The template's name in P3, which is the name of its task."""
        return config_name(self.dataset, self.subset, self.name)

    @property
    def source(self) -> str:
        """The data set and its subset, as in the folder of templates."""
        return _source(self.dataset, self.subset)


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template makes of a row; `choices` is empty for a template without answer choices."""

    input: str
    target: str
    choices: tuple[str, ...]


def config_name(dataset: str, subset: str | None, template: str) -> str:
    """Name a template as P3 names its configurations: `super_glue_rte_GPT_3_style`."""
    parts = (dataset, template) if subset is None else (dataset, subset, template)
    return re.sub(r"[^\w.]+", "_", "_".join(parts))


def load_templates(folder: Path, dataset: str, subset: str | None) -> list[Template]:
    """Read `<folder>/<dataset>[/<subset>]/templates.yaml`; the templates are sorted by name."""
    path = folder / _source(dataset, subset) / FILE
    if not path.is_file():
        raise DataError(_nothing_here(folder, _source(dataset, subset)))
    document = _read(path)
    if not isinstance(document, dict) or not isinstance(document.get("templates"), dict):
        raise DataError(f"{path}: expected 'dataset', 'subset' and a mapping 'templates'")
    stored = (document.get("dataset"), document.get("subset"))
    if stored != (dataset, subset):
        raise DataError(
            f"{path}: holds templates of dataset {stored[0]!r}, subset {stored[1]!r}; "
            f"mend these fields or move the file out of {_source(dataset, subset)}"
        )
    made: dict[str, Template] = {}
    for key, block in document["templates"].items():
        if not isinstance(block, _Block):
            raise DataError(f"{path}: templates: '{key}' is no !Template")
        place = f"{path}:{block.line}"
        template = _make_template(key, block, dataset=dataset, subset=subset, place=place)
        if template.name in made:
            raise DataError(f"{place}: template '{template.name}' stands twice; rename one")
        made[template.name] = template
    return [template for _, template in sorted(made.items())]


class Prompter:
    """Renders rows through templates, each of which is compiled once.

    `max_characters` cuts every value that a template prints, at a word and with `...` behind it;
    None leaves them whole. Promptsource, T0 and T-Few cut at 2048.

    `empty_render` decides about a row that a template was not written for, because its input or
    its target comes out empty: `drop` gives None for it, and `placeholder` what T-Few trains on,
    `<NO INPUT>` and `<NO LABEL>`. (P3 drops such rows as well, except that it keeps an input whose
    target is empty under `<NO LABEL>`: the rows of a test set without labels.)
    """

    def __init__(
        self,
        *,
        max_characters: int | None = 2048,
        seed: int = 0,
        empty_render: Literal["drop", "placeholder"] = "drop",
    ) -> None:
        self._max_characters = max_characters
        self._seed = seed
        self._empty_render = empty_render
        self._programs: dict[Template, tuple[jinja2.Template, jinja2.Template | None]] = {}

    def render(self, template: Template, row: Mapping[str, Any], *, row_id: str) -> Rendered | None:
        """Apply the template to a row, or return None for a row it says nothing about.

        `row_id` names the row in errors and, with the seed and the template, fixes random choices.
        Raises `DataError` if the row lacks a field or the template fails on it.
        """
        draws = (seed_from(self._seed, template.id, row_id, number) for number in count())
        try:
            with bounded():
                programs = self._programs.get(template) or self._compile(template)
                parts, choices = _apply(*programs, row, draws)
        except UnboundedTemplateError as error:
            raise UnboundedTemplateError(
                f"{template.source}: template '{template.name}' cannot render row {row_id}: "
                f"{error}; leave the template out"
            ) from error
        except Exception as error:  # a template may raise anything at all
            reason = str(error) or type(error).__name__
            if isinstance(error, jinja2.UndefinedError):
                reason += f" (fields: {', '.join(map(str, row))})"
            if isinstance(error, jinja2.TemplateSyntaxError):
                reason += f" (once cut to {self._max_characters} characters)"
            raise DataError(
                f"{template.source}: template '{template.name}' cannot render row {row_id}: "
                f"{reason}; mend the row or leave the template out"
            ) from error
        if len(parts) == 2 and all(parts):
            return Rendered(parts[0], parts[1], choices)
        if self._empty_render == "drop":
            return None
        text, target = parts if len(parts) == 2 else (NO_INPUT, NO_LABEL)
        return Rendered(text, target or NO_LABEL, choices)

    def _compile(self, template: Template) -> tuple[jinja2.Template, jinja2.Template | None]:
        text, choices = template.jinja, template.answer_choices
        if self._max_characters is not None:
            # The end of a printed expression may hold the `-` that eats white space.
            cut = rf" | string | truncate({self._max_characters}) \1}}}}"
            text = re.sub(r"([-+]?)\}\}", cut, text)
        expression = None if choices is None else SANDBOX.from_string(choices)
        self._programs[template] = programs = (SANDBOX.from_string(text), expression)
        return programs


def _apply(
    text: jinja2.Template,
    choices: jinja2.Template | None,
    row: Mapping[str, Any],
    draws: Iterator[int],
) -> tuple[list[str], tuple[str, ...]]:
    """Return the stripped parts of the rendered text, two if all went well, and the choices."""
    variables = {key.replace("-", "_"): _hide_separators(value) for key, value in row.items()}
    if "answer_choices" in variables:
        raise ValueError("a field is called 'answer_choices', a name of the templates' own")
    variables[DRAWS], hidden = draws, None
    if choices is not None:
        texts = check_length(choices.render(variables)).split(SEPARATOR)
        hidden = [choice.strip() for choice in texts]
    variables["answer_choices"] = hidden
    parts = [part.strip() for part in check_length(text.render(variables)).split(SEPARATOR)]
    show = methodcaller("replace", HIDDEN_SEPARATOR, SEPARATOR)
    return list(map(show, parts)), tuple(map(show, hidden or ()))


def _hide_separators(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(SEPARATOR, HIDDEN_SEPARATOR)
    if isinstance(value, list | tuple):
        return [_hide_separators(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _hide_separators(item) for key, item in value.items()}
    return value


class _Undefined(jinja2.Undefined):
    """Renders empty, as in promptsource, unless it stands for a name that nobody defined."""

    def __new__(  # type: ignore[misc]
        cls,
        hint: str | None = None,
        obj: Any = missing,
        name: str | None = None,
        exc: type[jinja2.TemplateRuntimeError] = jinja2.UndefinedError,
    ) -> jinja2.Undefined:
        if name is not None and obj is missing:
            return jinja2.StrictUndefined(hint, obj, name, exc)
        return super().__new__(cls)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, in which a forbidden attribute is an error even if nothing is done with it."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"attribute '{attribute}' of {type(obj).__name__} is not safe to read")


@jinja2.pass_context
def _choice(context: Context, items: Iterable[Any]) -> Any:
    items = list(items)
    if not items:
        raise ValueError("a choice from nothing")
    return items[next(context[DRAWS]) % len(items)]


def _most_frequent(items: Iterable[Hashable]) -> list[Hashable] | None:
    """Return all items that are as frequent as the most frequent one, first come first."""
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most] or None


def _highlight(text: str) -> str:
    return f"<span style='color: #F08080'>{text}</span>"


def _make_sandbox() -> _Sandbox:
    sandbox = _Sandbox(undefined=_Undefined)
    sandbox.filters |= {
        "choice": _choice,
        "random": _choice,
        "most_frequent": _most_frequent,
        "highlight": _highlight,
    }
    sandbox.globals["zip"] = zip
    del sandbox.globals["lipsum"]  # random text
    return sandbox


SANDBOX = _make_sandbox()


@dataclass(frozen=True, slots=True)
class _Block:
    """A tagged mapping of a template file and the line on which it starts."""

    line: int
    fields: dict[str, Any]


class _TemplateLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with promptsource's two tags and without keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key '{key}' stands twice", problem_mark=mark)
        return super().construct_mapping(node, deep=deep)

    def construct_block(self, node: yaml.MappingNode) -> _Block:
        """Build what carries one of the two tags."""
        fields = self.construct_mapping(node, deep=True)
        return _Block(node.start_mark.line + 1, {str(key): item for key, item in fields.items()})


for _tag in ("!Template", "!TemplateMetadata"):
    _TemplateLoader.add_constructor(_tag, _TemplateLoader.construct_block)


def _source(dataset: str, subset: str | None) -> str:
    return dataset if subset is None else f"{dataset}/{subset}"


def _nothing_here(folder: Path, wanted: str) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder of templates"
    known = sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob(FILE))
    family = [name for name in known if name.split("/")[0] == wanted.split("/")[0]] or known
    listed = ", ".join(family[:20]) + (", ..." if len(family) > 20 else "")
    hint = f"{did_you_mean(wanted, known)}; there are: {listed or 'none at all'}"
    return f"{folder}: no templates of '{wanted}'{hint}"


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_TemplateLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise DataError(f"{path}:{line}: not YAML: {error.problem}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _make_template(
    key: Any, block: _Block, *, dataset: str, subset: str | None, place: str
) -> Template:
    fields, metadata = block.fields, block.fields.get("metadata")
    about = metadata.fields if isinstance(metadata, _Block) else {}
    metrics = about.get("metrics")
    for name in ("name", "jinja"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise DataError(f"{place}: '{name}' of template '{key}' is missing or no text")
    place = f"{place}: template '{fields['name']}'"
    if not fields["name"].isprintable():
        raise DataError(f"{place}: its name has a character that cannot be printed")
    if not isinstance(fields.get("answer_choices"), str | None):
        raise DataError(f"{place}: 'answer_choices' is no text")
    if (n_separators := fields["jinja"].count(SEPARATOR)) != 1:
        raise DataError(
            f"{place}: 'jinja' has {n_separators} '{SEPARATOR}', expected <input> ||| <target>"
        )
    for name in ("jinja", "answer_choices"):
        try:
            with bounded():
                SANDBOX.compile(fields.get(name) or "", raw=True)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{place}: '{name}', line {error.lineno}: {error.message}") from error
        except (RecursionError, ArithmeticError, UnboundedTemplateError) as error:
            raise DataError(f"{place}: '{name}' cannot be compiled: {error}") from error
    return Template(
        name=fields["name"],
        dataset=dataset,
        subset=subset,
        jinja=fields["jinja"],
        answer_choices=fields.get("answer_choices"),
        is_original_task=about.get("original_task") is True,
        metrics=tuple(map(str, metrics if isinstance(metrics, list) else ())),
        id=str(fields.get("id", key)),
    )
