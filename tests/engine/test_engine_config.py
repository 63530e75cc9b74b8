"""DeepSpeed files: what the engine takes, what it owns, what it refuses."""

import copy
import json
from pathlib import Path

import pytest

from mhr_scale.engine.ds_config import (
    ALLOWED,
    OWNED,
    deepspeed_config,
    read_ds_config,
)
from mhr_scale.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes ds.json into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(content):
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        Path("ds.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "ds.json"

    return write


@pytest.fixture
def message(write):
    def message(content):
        with pytest.raises(EngineError) as caught:
            read_ds_config(write(content))
        return str(caught.value)

    return message


@pytest.fixture(scope="module")
def deepspeed():
    """DeepSpeed on CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed

        yield deepspeed


# -- reading ------------------------------------------------------------------------------------


def test_without_a_file_the_backbone_is_replicated():
    assert read_ds_config(None) == {"zero_optimization": {"stage": 0}}


def test_a_file_is_read_as_it_is(write):
    content = {"zero_optimization": {"stage": 3, "overlap_comm": False}, "aio": {"thread_count": 1}}
    assert read_ds_config(write(content)) == content


@pytest.mark.parametrize("stage", [0, 3])
def test_replicated_and_sharded_are_the_two_placements(write, stage):
    content = {"zero_optimization": {"stage": stage}}
    assert read_ds_config(write(content)) == content


def test_a_file_without_a_stage_is_replicated_and_allowed(write):
    assert read_ds_config(write({})) == {}


def test_a_file_of_the_checkout_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("ds_configs/replicated.json") == {"zero_optimization": {"stage": 0}}


def test_a_file_here_is_preferred_to_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "replicated.json").write_text("{}")
    assert read_ds_config("ds_configs/replicated.json") == {}


def test_a_missing_file_names_the_places_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError) as caught:
        read_ds_config("nowhere.json")
    assert str(caught.value) == (
        f"run.ds_config: no file 'nowhere.json' (looked at {tmp_path / 'nowhere.json'}, "
        f"{ROOT / 'nowhere.json'}); known by name: {', '.join(name[:-5] for name in SHIPPED)}"
    )


def test_a_misspelt_file_comes_with_a_suggestion():
    with pytest.raises(EngineError, match=r"did you mean 'zero3'\?; known by name: "):
        read_ds_config("ds_configs/zero4.json")


@pytest.mark.parametrize("name", ["zero3", "zero3.json", "ds_configs/zero3.json"])
def test_a_shipped_file_is_found_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").mkdir()
    assert read_ds_config(name) == json.loads((ROOT / "ds_configs" / "zero3.json").read_text())


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(EngineError, match="no file"):
        read_ds_config(str(tmp_path))


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # unknown keys, which DeepSpeed would ignore
        (
            {"zero_optimisation": {"stage": 3}},
            "ds.json: unknown key 'zero_optimisation'; did you mean 'zero_optimization'?; allowed",
        ),
        ({"gradient_cliping": 1.0}, "ds.json: unknown key 'gradient_cliping'; allowed: zero_opt"),
        # keys and values that DeepSpeed refuses
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_sizee": 1}},
            "ds.json: unknown key 'zero_optimization.reduce_bucket_sizee'; "
            "did you mean 'reduce_bucket_size'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "ds.json: unknown key 'zero_optimization.offload_param.devise'",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}},
            "ds.json: zero_optimization.reduce_bucket_size: input should be greater than 0, got -1",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            "ds.json: zero_optimization.offload_param.device: input should be 'none', 'cpu' or",
        ),
        # stages that have nothing to shard
        ({"zero_optimization": {"stage": 1}}, "ds.json: zero_optimization.stage 1: "),
        ({"zero_optimization": {"stage": 2}}, "ds.json: zero_optimization.stage 2: "),
        ({"zero_optimization": {"stage": "3"}}, "ds.json: zero_optimization.stage '3': "),
        ({"zero_optimization": 3}, "ds.json: zero_optimization is an object, got 3"),
        ({"zero_optimization": None}, "ds.json: zero_optimization is an object, got null"),
        # "auto"
        ({"communication_data_type": "auto"}, 'ds.json: communication_data_type: "auto" is'),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            'ds.json: zero_optimization.reduce_bucket_size: "auto" is a convention of another',
        ),
        ({"comms_logger": {"prof_ops": ["x", "auto"]}}, 'ds.json: comms_logger.prof_ops.1: "auto"'),
        # files that are no JSON object
        ('{"aio": {},\n "x"}', "ds.json:2: not JSON (Expecting ':' delimiter)"),
        (
            "{\n\n// no\n}",
            "ds.json:3: not JSON (Expecting property name enclosed in double quotes)",
        ),
        ("", "ds.json:1: not JSON (Expecting value)"),
        (b"\xff\xfe", "ds.json: not UTF-8 text (invalid start byte)"),
        ([], "ds.json: not a JSON object"),
        ('{"aio": {"x": 1, "x": 1}}', "ds.json: not JSON (key 'x' stands twice)"),
    ],
)
def test_a_mistake_is_refused_with_its_place(message, content, expected):
    assert message(content).startswith(expected)


def test_what_the_recipe_says_is_refused_and_its_setting_named(message):
    for key, setting in OWNED.items():
        assert message({key: 1}).startswith(f"ds.json: '{key}' belongs to the recipe ({setting})")


@pytest.mark.parametrize("value", ["auto", {"enabled": "auto"}])
def test_a_data_type_left_to_auto_belongs_to_the_recipe_too(message, value):
    assert message({"bf16": value}).startswith("ds.json: 'bf16' belongs to the recipe")


def test_no_key_is_both_allowed_and_the_recipes():
    assert set(ALLOWED).isdisjoint(OWNED)


# -- what DeepSpeed gets --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "enabled"), [("bfloat16", True), ("float32", False)])
def test_the_data_type_comes_from_the_recipe(dtype, enabled):
    assert deepspeed_config({}, dtype=dtype)["bf16"] == {"enabled": enabled}


def test_the_files_content_is_handed_on():
    content = {"zero_optimization": {"stage": 3}, "aio": {"thread_count": 2}}
    assert deepspeed_config(content, dtype="float32").items() >= content.items()


def test_deepspeed_gets_no_optimizer_and_no_clipping():
    made = deepspeed_config({"zero_optimization": {"stage": 3}}, dtype="bfloat16")
    assert made.keys().isdisjoint({"gradient_clipping", "optimizer", "scheduler", "fp16"})


def test_making_the_dictionary_changes_nothing():
    content = {"zero_optimization": {"stage": 3}}
    before = copy.deepcopy(content)
    deepspeed_config(content, dtype="bfloat16")["bf16"]["enabled"] = False
    assert (content, deepspeed_config(content, dtype="bfloat16")["bf16"]) == (
        before,
        {"enabled": True},
    )


# -- the shipped files ----------------------------------------------------------------------------


def test_there_are_shipped_files():
    assert {"replicated.json", "zero3.json", "cpu.json"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_accepts_a_shipped_file(deepspeed, name):
    content = read_ds_config(f"ds_configs/{name}")
    accepted = deepspeed.runtime.config.DeepSpeedConfig(deepspeed_config(content, dtype="float32"))
    assert accepted.zero_config.stage == content["zero_optimization"]["stage"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deepspeed_understands_our_data_type(deepspeed, dtype):
    accepted = deepspeed.runtime.config.DeepSpeedConfig(deepspeed_config({}, dtype=dtype))
    assert (accepted.bfloat16_config.enabled, accepted.float16_config.enabled) == (
        dtype == "bfloat16",
        False,
    )


@pytest.mark.parametrize(
    "name", [name for name in SHIPPED if "zero3" in name or name == "cpu.json"]
)
def test_a_shipped_sharded_file_bounds_what_is_gathered_at_a_time(name):
    zero = read_ds_config(f"ds_configs/{name}")["zero_optimization"]
    limits = ("stage3_max_live_parameters", "stage3_prefetch_bucket_size", "reduce_bucket_size")
    assert all(zero[limit] <= 3e8 for limit in limits)


@pytest.mark.parametrize(
    "name", [name for name in SHIPPED if "zero3" in name or name == "cpu.json"]
)
def test_a_shipped_sharded_file_keeps_torchs_linear(name):
    """DeepSpeed's own would save the inputs of frozen linears for gradients nobody wants."""
    content = read_ds_config(f"ds_configs/{name}")
    assert content["zero_optimization"]["memory_efficient_linear"] is False
