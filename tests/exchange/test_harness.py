"""lm-evaluation-harness on our ranking and generation: the answers of its Hugging Face model."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_tokenizers import TEMPLATE, make_tokenizer
from processes import ROOT
from small_causal import small_causal
from small_t5 import small_t5
from transformers import ByT5Tokenizer

from mhr_scale import AdapterConfig, attach, average, collapse, save_adapter
from mhr_scale.adapters import peft_folders
from mhr_scale.errors import ConfigError, UserError
from mhr_scale.verbs.harness import run_harness

lm_eval = pytest.importorskip("lm_eval", reason='pip install "mhr_scale[lm-eval]"')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mhr_scale.exchange.harness import RoutedLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS = ("causal", "encoder-decoder")
TASKS = ("copy", "sort", "count")
HARNESS_TASKS = {"mhr_choose": "copy", "mhr_write": "sort", "mhr_whole": "count"}
PLACE = "tests/exchange/harness_tasks"


def make_folders(folder: Path, form: str) -> None:
    """A backbone, an adapter of it, and PEFT folders of its tasks and of its average."""
    if form == "causal":
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        model = small_causal("llama", vocab_size=259, max_position_embeddings=96, **ids)
        tokenizer = make_tokenizer(chat_template=TEMPLATE)
    else:
        model, tokenizer = small_t5(tied=True), ByT5Tokenizer()
    backbone = folder / "backbone"
    model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    config = AdapterConfig(rank=2, n_skills=3, n_splits=2)
    adapter = attach(model, config, tasks=TASKS)
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():
        strength = 2.0 if name == "routing_logits" else 0.3
        parameter.data = strength * torch.randn_like(parameter)
    save_adapter(adapter, folder / "adapter", backbone={"name": str(backbone), "dtype": "float32"})
    for task in TASKS:
        peft_folders.write_peft_lora(collapse(adapter, task), folder / task, base_model=None)
    peft_folders.write_peft_lora(average(adapter), folder / "average", base_model=None)


@pytest.fixture(scope="module", params=FORMS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_folders(folder, request.param)
    return folder


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip


def ask(model: str, arguments: dict[str, Any], tasks: Any, **options: Any) -> dict[str, list[Any]]:
    """The model's answers to each task, in order."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=PLACE, include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        **options,
    )
    return {
        name: [sample["resps"] for sample in sorted(lines, key=lambda line: line["doc_id"])]
        for name, lines in found["samples"].items()
    }


def stock(folder: Path, adapter: str, tasks: Any, **options: Any) -> dict[str, list[Any]]:
    """The answers of the harness's own model with an exported folder."""
    arguments = {
        "pretrained": str(folder / "backbone"),
        "peft": str(folder / adapter),
        "dtype": "float32",
    }
    return ask("hf", arguments, tasks, **options)


def flat(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return [item for value in values for item in flat(value)]
    return [values]


def check_same(own: dict[str, list[Any]], wanted: dict[str, list[Any]], *, is_causal: bool) -> None:
    assert own.keys() == wanted.keys()
    for name in wanted:
        pairs = list(zip(flat(own[name]), flat(wanted[name]), strict=True))
        assert pairs
        for value, other in pairs:
            if isinstance(other, float):
                assert value == pytest.approx(other, abs=1e-4 * max(1.0, abs(other)) / 10)
            elif isinstance(other, str) and not is_causal:
                # the harness lets an encoder-decoder write as many tokens more as it has read
                assert value
                assert other.startswith(value)
            else:
                assert value == other


def test_every_task_has_its_own_adapter_and_the_answers_of_stock_peft(folders: Path) -> None:
    is_causal = folders.name.startswith("causal")
    arguments = {"adapter": str(folders / "adapter"), "map": HARNESS_TASKS}
    own = ask("mhr_scale", arguments, HARNESS_TASKS)
    wanted = {}
    for name, task in HARNESS_TASKS.items():
        wanted |= stock(folders, task, [name])
    check_same(own, wanted, is_causal=is_causal)
    texts = flat(own["mhr_write"])
    assert len(set(texts)) > 1
    likelihoods = [value for value in flat(own["mhr_choose"]) if type(value) is float]
    assert len(set(likelihoods)) > 6


@pytest.mark.parametrize("folders", ["causal"], indirect=True)
def test_chats_few_shots_and_the_average_are_as_in_the_harness(folders: Path) -> None:
    options = {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True}
    tasks = ["mhr_choose", "mhr_write"]
    arguments = {"adapter": str(folders / "adapter"), "backbone": str(folders / "backbone")}
    own = ask("mhr_scale", {**arguments, "max_tokens": 300}, tasks, **options)
    check_same(own, stock(folders, "average", tasks, **options), is_causal=True)
    bare = ask("mhr_scale", {"backbone": str(folders / "backbone"), "dtype": "float32"}, tasks)
    hf = {"pretrained": str(folders / "backbone"), "dtype": "float32"}
    check_same(bare, ask("hf", hf, tasks), is_causal=True)


@pytest.mark.parametrize("folders", ["causal"], indirect=True)
def test_the_command_prints_the_harness_s_table(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(TaskManager, include_defaults=False)  # there are thousands of others
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    words = ["--model", "mhr_scale", "--tasks", "mhr_choose", "--include_path", PLACE]
    arguments = f"adapter={folders / 'adapter'},task=sort"
    table = run_harness([*words, "--model_args", arguments, "--device", "cpu"])
    assert "|mhr_choose|" in table
    assert "Tasks" in table  # an old pytablewriter heads columns with letters
    assert sys.argv[0] != "lm_eval"


@pytest.mark.parametrize("folders", ["causal"], indirect=True)
def test_what_cannot_be_asked_is_one_line(folders: Path, tmp_path: Path) -> None:
    adapter = str(folders / "adapter")
    other = small_causal("llama", vocab_size=259, hidden_size=64, bos_token_id=0, eos_token_id=1)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    wrong = tmp_path / "map.yaml"
    wrong.write_text("mhr_choose: sorted\n")
    refused: list[tuple[str, dict[str, Any]]] = [
        ("no setting 'adaptor'; did you mean 'adapter'?", {"adaptor": adapter}),
        ("give an adapter, a backbone, or both", {}),
        ("task 'sortt' is not in this adapter; did you mean 'sort'?", {"task": "sortt"}),
        ("mhr_choose: task 'sorted' is not in this adapter", {"map": str(wrong)}),
        ("task and map; give one of them", {"task": "sort", "map": HARNESS_TASKS}),
        ("nothing.yaml", {"map": str(tmp_path / "nothing.yaml")}),
        ("made for another backbone", {"backbone": str(tmp_path / "other")}),
        ("no adapter here", {"adapter": str(tmp_path)}),
    ]
    for text, arguments in refused:
        whole = arguments if not arguments or "adaptor" in arguments else {"adapter": adapter}
        with pytest.raises(UserError) as caught:
            RoutedLM(**{**whole, **arguments})
        assert text in str(caught.value), str(caught.value)
    with pytest.raises(ConfigError, match="'mhr_choose' is not in it; did you mean 'mhr_chose'"):
        ask("mhr_scale", {"adapter": adapter, "map": {"mhr_chose": "sort"}}, ["mhr_choose"])


@pytest.mark.parametrize("folders", ["causal"], indirect=True)
def test_sampling_is_the_model_s_own_and_each_request_has_its_options(folders: Path) -> None:
    model = RoutedLM(str(folders / "adapter"), task="sort", device="cpu", dtype="float32")
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 1}
    options = [
        {"until": ["a"], "max_gen_toks": 8},
        {"until": ["a"], "max_gen_toks": 8, **sampling},
        {"until": [], "max_gen_toks": 3},
        {"max_new_tokens": 8, "until": "zz", **sampling, "top_k": 50, "temperature": 9.0},
    ]
    requests = [
        Instance("generate_until", {}, ("Go on", own), number, metadata=("any", number, 1))
        for number, own in enumerate(options)
    ]
    greedy, top, short, wild = model.generate_until(requests, disable_tqdm=True)
    assert greedy == top
    assert greedy.startswith(short[: len(greedy)])
    assert wild != greedy
    refused = Instance("generate_until", {}, ("x", {"max_length": 9}), 0, metadata=("any", 0, 1))
    with pytest.raises(ConfigError, match="max_length; say max_gen_toks instead"):
        model.generate_until([refused])


def test_a_head_of_its_own_stays_one(tmp_path: Path) -> None:
    """The harness ties the weights of a model anew, by what its configuration says."""
    small_t5().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    model = RoutedLM(backbone=str(tmp_path), dtype="float32", device="cpu").model
    assert not torch.equal(model.get_output_embeddings().weight, model.shared.weight)
