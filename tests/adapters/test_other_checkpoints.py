"""Checkpoints of the reference's later releases and of T-Few: what tells them apart."""

import pytest
import torch
from published import assert_same, make, publish, store
from small_causal import small_causal
from tiny import TASKS, randomise

from mhr_scale.adapters import AdapterConfig, attach, peft_folders
from mhr_scale.adapters.reference_checkpoints import read_published
from mhr_scale.errors import AdapterError

# --- skills before splits, as later releases store them


def later(tensors, *, experts=False):
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("lora_a"):
            tensor = tensor.transpose(0, 1).contiguous()
        elif name.endswith("lora_b"):
            tensor = tensor.permute(1, 2, 0, 3).contiguous()
        if experts and "lora_" in name:
            name = name.replace(".lora_", ".experts.lora_")
        found[name] = tensor
    return found


#: Splits, skills and rank whose tensors fit both ways, as earlier and as later releases store them.
OPEN = [
    (dict, (4, 4, 4)),
    (later, (4, 4, 4)),
    (dict, (2, 4, 4)),
    (dict, (4, 2, 2)),
    (later, (2, 4, 2)),
    (later, (4, 2, 4)),
]
SHAPES = [(4, 3, 2), (1, 3, 2), (1, 3, 1), (1, 2, 2), *(shape for _, shape in OPEN)]


def make_shape(shape):
    n_splits, n_skills, rank = shape
    return make(AdapterConfig(n_splits=n_splits, n_skills=n_skills, rank=rank))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [dict, later])
def test_an_inventory_is_read_whichever_dimension_stands_first(form, shape, tmp_path):
    adapter = make_shape(shape)
    path = store(form(publish(adapter)), tmp_path)
    first = "skills" if form is later else "splits"
    found = read_published(path, first=first if (form, shape) in OPEN else None)
    assert found.config == adapter.config
    assert_same(found, adapter)


@pytest.mark.parametrize("shape", SHAPES)
def test_names_of_the_latest_releases_tell_what_stands_first(shape, tmp_path):
    adapter = make_shape(shape)
    found = read_published(store(later(publish(adapter), experts=True), tmp_path))
    assert_same(found, adapter)


@pytest.mark.parametrize(("form", "shape"), OPEN)
def test_what_fits_both_ways_is_not_guessed(form, shape, tmp_path):
    path = store(form(publish(make_shape(shape))), tmp_path)
    with pytest.raises(AdapterError, match=r"best.ckpt: . and . may be .*first='splits'"):
        peft_folders.open_adapter(path)


@pytest.mark.parametrize("known_by", ["hyper-parameters", "the backbone's width"])
@pytest.mark.parametrize(("form", "shape"), OPEN[2:])
def test_numbers_of_splits_and_skills_or_the_width_tell_what_stands_first(
    shape, known_by, form, tmp_path
):
    adapter, settings = make_shape(shape), {}
    if known_by == "hyper-parameters":
        settings = {"n_splits": shape[0], "n_skills": shape[1]}
    path = store(form(publish(adapter)), tmp_path, **settings)

    def sizes(name, *, is_needed):
        return {} if settings else {"d_model": 32}

    assert_same(peft_folders.open_adapter(path, sizes=sizes)[1], adapter)


# --- T-Few's files


def store_tfew(adapter, folder):
    """Bare tensors, vectors as columns and pairs as PEFT has them."""
    tensors = {
        name: tensor[:, None] if tensor.ndim == 1 else tensor.T.contiguous()
        for name, tensor in publish(adapter).items()
    }
    torch.save(tensors, folder / "finish.pt")
    return folder / "finish.pt"


def test_vectors_of_tfew_are_read_where_the_backbone_is_known(tmp_path):
    adapter = make(AdapterConfig(kind="ia3", layout="light", n_skills=1))
    path = store_tfew(adapter, tmp_path)
    _, found = peft_folders.open_adapter(path, sizes=lambda name, is_needed: {"d_model": 32})
    assert (found.config, found.sites) == (adapter.config, adapter.sites)
    assert_same(found, adapter)
    with pytest.raises(AdapterError, match=r"finish.pt: .*width.*set backbone_moved_to"):
        peft_folders.open_adapter(path)


@pytest.mark.parametrize("layout", ["full", "attention"])
def test_pairs_of_tfew_are_turned(layout, tmp_path):
    adapter = make(AdapterConfig(layout=layout, n_skills=1, rank=2))
    assert_same(read_published(store_tfew(adapter, tmp_path)), adapter)


# --- decoder-only backbones, and the forms of later releases' files


@pytest.mark.parametrize(
    ("backbone", "layout", "granularity"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj"), "linear"),
        ("phi", ("q_proj", "k_proj", "v_proj", "dense"), "block"),
        ("mistral", ("gate_proj", "up_proj", "down_proj"), "block"),
        ("gpt2", "full", "linear"),
    ],
)
def test_checkpoints_of_causal_models_are_read(backbone, layout, granularity, tmp_path):
    config = AdapterConfig(layout=layout, rank=2, n_skills=3, n_splits=4, granularity=granularity)
    adapter = randomise(attach(small_causal(backbone), config, tasks=TASKS))
    for experts in (False, True):
        tensors = later(publish(adapter), experts=experts)
        found = read_published(store(tensors, tmp_path, lora_alpha=16.0), first="skills")
        assert (found.sites, found.config.alpha) == (adapter.sites, 16.0)
        assert found.config.granularity == granularity
        assert_same(found, adapter)


@pytest.mark.parametrize(
    ("form", "alpha"),
    [
        (lambda t: {"module": {f"model.{n}": x for n, x in t.items()}}, 1.0),
        (lambda t: {"expert_weights": t, "expert_info": {"expert_config": {"lora_alpha": 8}}}, 8.0),
        (lambda t: {"expert_weights": t, "expert_info": None}, 1.0),
    ],
    ids=["DeepSpeed", "library", "library without settings"],
)
def test_files_of_later_releases_are_read(form, alpha, tmp_path):
    config = AdapterConfig(layout="attention", rank=4, n_skills=1)
    adapter = randomise(attach(small_causal("llama"), config, tasks=("a",)))
    torch.save(form(publish(adapter)), tmp_path / "expert.ckpt")
    found = peft_folders.open_adapter(tmp_path / "expert.ckpt")[1]
    assert (found.config.alpha, found.sites) == (alpha, adapter.sites)
    assert_same(found, adapter)
