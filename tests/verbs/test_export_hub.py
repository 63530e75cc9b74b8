"""To the hub and back: what is pushed is what is read there, of the revision that is asked for."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Hub, environment, hub_at, serving
from huggingface_hub import ModelCard
from processes import ROOT, run_code
from safetensors.torch import load_file, save_file
from toy_exports import (
    BASE,
    FACTS,
    TASKS,
    assert_close,
    assert_same,
    files,
    make,
    native_logits,
    rows,
    run_export,
    save_run,
)

from mhr_scale import load_adapter
from mhr_scale.adapters import Adapter, artefact
from mhr_scale.adapters.collapse import average, collapse
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.of_adapter import backbone_facts, backbone_of, open_adapter
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    AnalyseConfig,
    AverageConfig,
    BackboneConfig,
    EvaluateConfig,
    PlainRunConfig,
    PretrainConfig,
    RunConfig,
    ScoringConfig,
    ToyTasks,
    VariantConfig,
)
from mhr_scale.engine.meeting import describe_launch
from mhr_scale.errors import AdapterError, RunError
from mhr_scale.exchange.stock import open_lora
from mhr_scale.jobs.adapt_inputs import open_jobs
from mhr_scale.recipe.reading import load
from mhr_scale.run.files import read_json, read_object
from mhr_scale.verbs.analyse import analyse
from mhr_scale.verbs.average import average as do_average
from mhr_scale.verbs.evaluate import evaluate, every_average
from mhr_scale.verbs.pretrain import start_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",
    "ignore:.torch.jit.script_method. is deprecated",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that has the toy backbone, and no adapter yet."""
    with serving() as hub, hub_at(hub.url, tmp_path_factory.mktemp("cache")):
        hub.add("o/base", BASE)
        yield hub


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose backbone is the hub's."""
    facts = read_blueprint(BackboneConfig(name="o/base@main")).facts
    folder = tmp_path_factory.mktemp("runs") / "MHR"
    return save_run(folder, make("MHR"), backbone={**FACTS, **facts}, step=7)


def push(hub: Hub, run: str, folder: Path, place: str, **changes: object) -> Adapter:
    """Export and push, unchecked; returns what the place holds."""
    run_export(run, folder, hub=place, **{"check": False, **changes})
    name, _, inside = place.partition(":")
    name = name if "@" in name else f"{name}@main"
    return open_adapter(f"{name}:{inside}" if inside else name)[1]


#: Settings, the place that is pushed to, and the one that is read.
PUSHED = {
    "peft": ({}, "o/peft", "o/peft@main"),
    "native": ({"format": "native"}, "o/all@v1:whole", "o/all@v1:whole"),
    "poly": ({"format": "peft_poly"}, "o/all@v1:poly", "o/all@v1:poly"),
    "tasks": ({"what": "all_tasks", "format": "peft"}, "o/tasks", "o/tasks@main:sort%2Fit"),
    "merged": ({"format": "merged", "dtype": "float32"}, "o/merged:inner", "o/merged@main:inner"),
}
LINES = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)

FRESH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
rows, found = load_file("rows.safetensors"), {}
for name, code in json.load(open("lines.json")).items():
    space = {}
    exec(code, space)
    model = space["model"].float().eval()
    extra = {"task_ids": torch.tensor([2, 0, 1, 1, 2, 0])} if name == "poly" else {}
    with torch.no_grad():
        if "adapter" in space:
            with space["adapter"].slots([2, 0, 1, 1, 2, 0]):
                found[name] = model(**rows).logits
        else:
            found[name] = model(**rows, **extra).logits
save_file(found, "logits.safetensors")
"""


@pytest.fixture(scope="module")
def pushed(hub: Hub, run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all formats, pushed."""
    here = tmp_path_factory.mktemp("pushed")
    for name, (settings, place, _) in PUSHED.items():
        run_export(run, here / name, hub=place, check=name == "peft", **settings)
    return here


def test_what_is_read_from_the_hub_has_the_bits_of_what_was_pushed(
    hub: Hub, pushed: Path, tmp_path: Path
) -> None:
    whole, mean, one = make("MHR"), average(make("MHR")), collapse(make("MHR"), TASKS[0])
    assert_same(open_adapter("o/peft@main")[1], mean)
    assert_same(load_adapter("o/all@v1:whole"), whole)
    assert_same(open_adapter("o/all@v1:poly")[1], whole)
    assert_same(open_adapter("o/tasks@main:copy.plus1.plain")[1], one)
    merged = read_blueprint(BackboneConfig(name="o/merged@main:inner"))
    (file,) = (pushed / "merged").glob("*.safetensors")
    for name, tensor in load_file(file).items():
        assert torch.equal(merged.source.views(name)[name], tensor)
    for name in ("o/peft", "o/all", "o/tasks", "o/merged"):
        assert hub.repositories[name].private
    assert "adapter.json" not in hub.files("o/all")
    again = run_export("o/all@v1:whole", tmp_path / "again", format="peft_poly", check=False)
    assert_same(open_adapter(str(again))[1], whole)


def test_folders_name_the_backbone_and_its_commit(hub: Hub, pushed: Path) -> None:
    commit = hub.repositories["o/base"].branches["main"]
    for name in ("peft", "poly", "tasks/sort%2Fit"):
        config = read_object(pushed / name / "adapter_config.json", RunError)
        assert (config["base_model_name_or_path"], config["revision"]) == ("o/base", commit)
    for place in ("o/peft@main", "o/all@v1:whole"):
        card = open_adapter(place)[0]
        backbone = backbone_of(place, card, None)
        assert (backbone.name, backbone.revision) == ("o/base", commit)
    assert load_card(pushed / "native").backbone["revision"] == "main"


def load_card(folder: Path) -> artefact.Card:
    return artefact.read_card(folder)


@pytest.mark.slow
def test_the_lines_of_the_cards_load_what_was_exported(
    hub: Hub, pushed: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = {}
    for name in PUSHED:
        text = (pushed / name / "README.md").read_text()
        (lines[name],) = LINES.findall(text)
        assert len(lines[name].splitlines()) <= 5
    run_export(str(pushed / "native"), tmp_path / "here", check=False)
    (lines["here"],) = LINES.findall((tmp_path / "here" / "README.md").read_text())
    save_file(rows(), tmp_path / "rows.safetensors")
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, tmp_path / "cache").items():
            patch.setenv(name, value)
        run_code(FRESH, str(ROOT), folder=tmp_path)
    found = load_file(tmp_path / "logits.safetensors")
    whole = make("MHR")
    mean, routed = native_logits(average(whole)), native_logits(whole, (2, 0, 1, 1, 2, 0))
    first = native_logits(collapse(whole, TASKS[0]))
    expected = {"peft": mean, "native": routed, "poly": routed, "tasks": first, "merged": mean}
    assert found.keys() == {*expected, "here"}
    for name, logits in {**expected, "here": mean}.items():
        assert_close(found[name], logits)


# --- the card


def test_the_card_says_what_it_is_to_people_and_to_the_hub(hub: Hub, pushed: Path) -> None:
    commit = hub.repositories["o/base"].branches["main"]
    card = ModelCard.load(pushed / "peft" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "o/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["mhr_scale", "lora", "mhr", "multi-task"],
    }
    numbers = sum(parameter.numel() for parameter in make("MHR").parameters())
    for words in (
        "# peft\n\nThe average, exported by mhr_scale (`format: peft`)",
        f"| base model | `o/base`, revision `main`, commit `{commit}` |",
        "| trained as | MHR: 3 skills, 4 splits, rank 2, alpha 1, layout attention (",
        f"| numbers trained | {numbers:,} |",
        "| steps | 7 |",
        "<summary>3 training tasks</summary>\n\n- copy.plus1.plain\n- sort/it\n",
        'PeftModel.from_pretrained(model, "o/peft")',
        "## Licence\n\nNot stated.",
    ):
        assert words in card.text
    assert hub.files("o/peft")["README.md"].decode() == (pushed / "peft" / "README.md").read_text()
    tasks = (pushed / "tasks" / "README.md").read_text()
    assert "- `sort%2Fit`: sort/it\n" in tasks
    assert ModelCard.load(pushed / "merged" / "README.md").data.library_name == "transformers"


# --- pushing again


def test_a_push_that_fails_leaves_the_folder_and_the_same_command_pushes_it(
    hub: Hub, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    hub.refuses = "/commit/"
    with pytest.raises(RunError) as caught:
        push(hub, run, out, "o/later")
    hub.refuses = ""
    assert re.fullmatch(
        rf"hub: o/later: not pushed \(HfHubHTTPError: .*\); {out} is whole: the same command "
        "pushes it again",
        str(caught.value),
    )
    made = {file: (out / file).stat().st_mtime_ns for file in files(out)}
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMine.\n")
    mean = average(make("MHR"))
    with monkeypatch.context() as patch:
        patch.setattr("mhr_scale.adapters.peft_folders.write_peft_lora", None)
        assert_same(push(hub, run, out, "o/later", licence="mit"), mean)
    assert hub.files("o/later")["README.md"].endswith(b"\nMine.\n")
    del made["README.md"]
    assert made == {file: (out / file).stat().st_mtime_ns for file in made}
    with pytest.raises(RunError, match=r"exported with other settings \(task was null"):
        push(hub, run, out, "o/later", what="task", task=TASKS[0])
    other = save_run(tmp_path / "other", make("MHR", seed=1))
    (tmp_path / "there").symlink_to(run)
    run_export(str(tmp_path / "there"), tmp_path / "linked", check=False)
    (tmp_path / "there").unlink()
    (tmp_path / "there").symlink_to(other)
    with pytest.raises(RunError, match="there holds another adapter now; name another folder"):
        push(hub, str(tmp_path / "there"), tmp_path / "linked", "o/later")
    (out / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"adapter_model.safetensors: not what was exported"):
        push(hub, run, out, "o/later")


def test_a_card_that_nobody_changed_follows_the_recipe(hub: Hub, run: str, tmp_path: Path) -> None:
    run_export(run, tmp_path / "out", check=False)
    push(hub, run, tmp_path / "out", "o/licensed@v2", licence="mit")
    card = ModelCard(hub.files("o/licensed", "v2")["README.md"].decode())
    assert card.data.license == "mit"
    assert '(model, "o/licensed", revision="v2")' in card.text


def test_nothing_is_made_public_by_oversight_and_nothing_pushed_without_a_token(
    hub: Hub, run: str, tmp_path: Path
) -> None:
    hub.add("o/public", {"x": b""})
    with pytest.raises(RunError, match="o/public is public, and hub_private is true; set hub_priv"):
        push(hub, run, tmp_path / "out", "o/public")
    assert "README.md" not in hub.files("o/public")
    push(hub, run, tmp_path / "out", "o/public", hub_private=False)
    assert "README.md" in hub.files("o/public")
    push(hub, run, tmp_path / "out", "o/open", hub_private=False)
    assert not hub.repositories["o/open"].private
    for token, words in ((None, r"no token to push to o/x with; log in \(hf"), ("x", None)):
        with hub_at(hub.url, tmp_path, token=token), pytest.raises(RunError) as caught:
            push(hub, run, tmp_path / "fresh", "o/x")
        if words:
            assert re.search(words, str(caught.value))
            assert not (tmp_path / "fresh").exists()
        assert TOKEN not in str(caught.value)
    with pytest.raises(RunError, match="hub: 'name' is no place to push to; write owner/name"):
        push(hub, run, tmp_path / "fresh2", "name")


# --- reading


def test_what_is_no_adapter_on_the_hub_is_refused_in_one_line(
    hub: Hub, pushed: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"o/tasks@main: no adapter .* folders copy\.plus1"):
        open_adapter("o/tasks@main")
    with pytest.raises(AdapterError, match=r"^o/base@main: no adapter in that .*; give a folder"):
        load_adapter("o/base@main")
    with (
        hub_at(hub.url, tmp_path, token=None),
        pytest.raises(AdapterError, match=r"no such repository, or a private one: .*HF_TOKEN\);"),
    ):
        load_adapter("o/all@v1:whole")
    for reads in (open_adapter, load_adapter):
        with pytest.raises(AdapterError, match=r"^o/peft: no adapter.* here.*write o/peft@main$"):
            reads("o/peft")


def test_a_revision_that_moves_is_noticed(
    hub: Hub, run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(hub, run, tmp_path / "first", "o/moves", format="native")
    first = hub.repositories["o/moves"].branches["main"]
    config = EvaluateConfig(
        adapter="o/moves@main",
        routing="average",
        tasks=ToyTasks(suite="toy", n_tasks=2, train_examples=2, validation_examples=2),
        scoring=ScoringConfig(examples=1, max_new_tokens=2),
        run=PlainRunConfig(folder=str(tmp_path / "scores")),
    )
    evaluate(config)
    inputs = read_object(tmp_path / "scores" / "inputs.json", RunError)
    assert inputs["commit of o/moves"] == first
    (start,) = read_json(tmp_path / "scores" / "provenance.json", RunError)
    assert start["adapter"] == {"hub": "o/moves", "revision": "main", "commit": first}
    assert start["backbone"]["commit"] == hub.repositories["o/base"].branches["main"]

    second = hub.add("o/moves", {"note.txt": b"nothing of the adapter"})
    with caplog.at_level("INFO", "mhr_scale"):
        evaluate(config)
    assert f"commit of o/moves was {first}, is {second}, of the same content" in caplog.text

    other = save_run(tmp_path / "other", make("MHR", seed=1), backbone=FACTS)
    push(hub, other, tmp_path / "second", "o/moves", format="native")
    with pytest.raises(RunError, match=r"made from other content \(adapter o/moves was .* or name"):
        evaluate(config)
    evaluate(replace(config, adapter=f"o/moves@{first}"))
    hub.add("o/base", {"note.txt": b"nothing of the backbone"})
    assert backbone_of("x", artefact.read_card(run), None).revision == inputs["commit of o/base"]


def test_every_verb_takes_a_place_on_the_hub(hub: Hub, run: str, tmp_path: Path) -> None:
    hub.add("o/run", Path(run))
    hub.add("o/run", {"averaged/000003/adapter.json": b"{}", "steps/3/x.safetensors": b""})
    push(hub, run, tmp_path / "lora", "o/lora")
    whole, mean = make("MHR"), average(make("MHR"))

    averaged = AverageConfig(source="o/run@main", run=RunConfig(folder=str(tmp_path / "mean")))
    assert_same(artefact.load(do_average(averaged)), mean)
    origin = artefact.read_card(tmp_path / "mean").origin
    commit = hub.repositories["o/run"].branches["main"]
    assert origin["averaged_from"] == f"o/run@{commit}"

    run_folder = PlainRunConfig(folder=str(tmp_path / "analysed"))
    analyse(AnalyseConfig(adapter="o/run@main", alignment=None, run=run_folder))
    (start,) = read_json(tmp_path / "analysed" / "provenance.json", RunError)
    assert start["adapter"]["commit"] == commit

    _, card, lora = open_lora("o/lora@main", None)
    assert_same(lora, mean)
    assert card.backbone["name"] == "o/base"

    toy = ToyTasks(suite="toy", n_tasks=2, train_examples=4, validation_examples=2)
    pretraining = load(PretrainConfig, ROOT / "launch/recipes/toy.yaml", ["source=o/run@main"])
    begun = start_of(replace(pretraining, run=replace(pretraining.run, folder=str(tmp_path))))
    assert begun is not None
    assert_same(begun.adapter, whole)
    assert begun.place == f"o/run@{commit}"

    jobs = open_jobs(
        AdaptConfig(
            variants={"mu": VariantConfig(adapter="o/run@main", kind="average")},
            tasks=replace(toy, fold="held_out"),
            run=AdaptRunConfig(folder=str(tmp_path / "jobs")),
        )
    )
    assert {"adapter o/run", "commit of o/run", "commit of o/base"} <= jobs.contents.keys()

    steps = EvaluateConfig(adapter="o/run@main", extra_steps="all", tasks=toy, run=run_folder)
    with pytest.raises(RunError, match="holds a run already"):
        every_average(steps)
    free = replace(steps, run=PlainRunConfig(folder=str(tmp_path / "new")))
    assert [part.adapter for part in every_average(free)] == [
        "o/run@main:averaged/000003",
        "o/run@main",
    ]
    tokenized = BackboneConfig(name="builtin:toy", tokenizer="o/base@main")
    blueprint = read_blueprint(tokenized)
    load_tokenizer(tokenized, blueprint)
    base = hub.repositories["o/base"].branches["main"]
    assert backbone_facts(tokenized, blueprint)["tokenizer"] == f"o/base@{base}"
    assert not any("steps/" in file for file in hub.fetched())
    assert describe_launch("", 2)["commit of o/run"] == commit
