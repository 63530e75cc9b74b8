"""Blocks, ties, buffers, depths and first weights, found in the module of a configuration."""

import pytest
import torch
import transformers
from causal_folders import small_seeing
from small_causal import FAMILIES, small_causal

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError
from mhr_scale.exchange import stock
from mhr_scale.families import discovered
from mhr_scale.families.causal import CAUSAL
from mhr_scale.families.first_weights import make_weight
from mhr_scale.families.table import make_config
from mhr_scale.planning.sizes import read_sizes


def config_of(family, **changes):
    kind, fields = FAMILIES[family]
    return getattr(transformers, kind)(**{**fields, **changes})


def on_meta(config):
    with torch.device("meta"):
        return CAUSAL.build(config)


# -- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "count"),
    [
        ("llama", "model.layers", 7),
        ("phi3", "model.layers", 4),
        ("opt", "model.decoder.layers", 6),
        ("neox", "gpt_neox.layers", 4),
        ("gpt2", "transformer.h", 4),
        ("falcon new", "transformer.h", 4),
        ("qwen3 moe", "model.layers", 4),
        ("mixtral", "model.layers", 4),
    ],
)
def test_blocks_are_found(family, name, count):
    (blocks,) = CAUSAL.blocks(config_of(family)).values()
    assert (blocks.name, blocks.count, len(blocks.linears)) == (name, 2, count)


def test_experts_and_their_router_are_frozen():
    (blocks,) = CAUSAL.blocks(config_of("mixtral")).values()
    assert set(blocks.frozen) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert all(name.startswith("self_attn.") for name in blocks.linears)


def test_a_module_is_built_once_for_equal_configurations():
    one, other = config_of("llama"), config_of("llama")
    assert discovered.find(CAUSAL, one) is discovered.find(CAUSAL, other)
    deeper = config_of("llama", num_hidden_layers=3)
    assert discovered.find(CAUSAL, one) is not discovered.find(CAUSAL, deeper)


def test_a_configuration_that_changes_later_does_not_change_what_was_found():
    config = config_of("llama")
    found = discovered.find(CAUSAL, config)
    config.vocab_size = 7
    assert found.model.config.vocab_size == 96


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 5])
def test_a_model_of_another_depth_has_the_same_blocks(family, count):
    config = config_of(family)
    resized = CAUSAL.resize(config, {"decoder": count})
    (before,), (after,) = CAUSAL.blocks(config).values(), CAUSAL.blocks(resized).values()
    assert (after.count, after.sublayers) == (count, before.sublayers)
    assert config.num_hidden_layers == 2


# -- ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_said", "head", "is_tied"), [
    (True, None, True),
    (True, "equal", True),
    (True, "other", False),
    (False, None, False),
    (False, "equal", False),
])  # fmt: skip
def test_a_head_is_tied_where_it_is_said_and_absent_or_equal(is_said, head, is_tied):
    raw = config_of("llama", tie_word_embeddings=is_said).to_dict()
    names = {"model.embed_tokens.weight", *(["lm_head.weight"] if head else [])}
    ties = CAUSAL.find_ties(raw, frozenset(names), lambda *_: head == "equal")
    assert ties == ({"lm_head.weight": "model.embed_tokens.weight"} if is_tied else {})


# -- buffers --------------------------------------------------------------------------------------


def check_buffers(model, expected):
    expected = dict(expected.named_buffers())
    assert dict(model.named_buffers()).keys() == expected.keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_are_those_that_transformers_loads(family, tmp_path):
    """Which were never on the meta device, nor cast: as a rule float32, whatever weights are."""
    small_causal(family).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for changes in ({}, {"mapped": False}, {"quantise": "int8"}, {"quantise": "nf4"}):
        config = BackboneConfig(name=str(tmp_path), dtype="bfloat16", **changes)
        blueprint = read_blueprint(config)
        model = Engine({}, timeout_seconds=60).build(config, blueprint)
        check_buffers(model, theirs)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} <= {torch.bfloat16}
        check_buffers(stock.load_backbone(config, blueprint, torch.device("cpu")), theirs)


# -- first weights --------------------------------------------------------------------------------


def random_of(family, seed=0):
    kind, fields = FAMILIES[family]
    fields = {**fields, "model_type": getattr(transformers, kind).model_type}
    return read_blueprint(BackboneConfig(config=fields, config_seed=seed, dtype="float32"))


@pytest.mark.parametrize("family", FAMILIES)
def test_first_weights_spread_as_transformers_makes_them(family):
    source = random_of(family).source
    theirs = transformers.AutoModelForCausalLM.from_config(config_of(family)).state_dict()
    for name in source.names():
        numel = theirs[name].numel()
        weight = source.read(name, 0, numel)
        assert weight.isfinite().all()
        if numel >= 1000:
            assert weight.std() == pytest.approx(theirs[name].std().item(), rel=0.2), name
        elif not theirs[name].std():
            assert weight.unique().tolist() == [theirs[name].flatten()[0]]


def test_a_first_weight_follows_from_its_generator_and_leaves_all_others_alone():
    config, name = config_of("llama"), "model.layers.1.mlp.up_proj.weight"
    made, drawn = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(5)
        made.append(CAUSAL.random_weight(config, name, (48, 32), generator))
        drawn.append(torch.equal(torch.get_rng_state(), before))
    assert torch.equal(*made)
    assert drawn == [True, True]


def test_weights_of_other_names_differ():
    source = random_of("llama").source
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2)]
    assert not torch.equal(*(source.read(name, 0, 1024) for name in names))


def test_a_weight_that_nothing_initialises_is_refused_by_name():
    model = on_meta(config_of("llama"))
    model.model.extra = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(BackboneError, match=r"does not say how model\.extra of a llama begins"):
        make_weight(model, "model.extra", (3,), 0)


# -- recipes --------------------------------------------------------------------------------------


LLAMA = {**FAMILIES["llama"][1], "model_type": "llama"}


def test_a_recipe_may_say_what_configurations_on_the_hub_say():
    fields = {**LLAMA, "rope_theta": 500000.0}
    family, config, _ = make_config(fields)
    assert family is CAUSAL
    assert config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"model_type": "llama", "hiden_size": 8}, "has no setting 'hiden_size'; did you mean"),
        ({"model_type": "llama", "vocab_size": 0}, "vocab_size 0 is not a whole number from 1"),
        ({"model_type": "gemma3"}, "a gemma3 is a text model with others"),
        ({"model_type": "mamba"}, "a mamba has no num_attention_heads"),
        ({"model_type": "bloom"}, "bloom tells positions by ALiBi"),
        ({"model_type": "trocr"}, "a trocr takes no position_ids"),
        (
            {
                "model_type": "lfm2",
                "num_hidden_layers": 2,
                "layer_types": ["conv", "full_attention"],
            },
            "has layers of kind conv",
        ),
        ({"model_type": "bert"}, "its blocks are called bert.encoder.layer"),
        ({"model_type": "bart"}, "a bart is an encoder-decoder"),
        ({"model_type": "distilbert"}, "model_type 'distilbert' is of no family"),
        ({"model_type": "jamba"}, "has layers of kind linear_attention"),
        ({**LLAMA, "num_key_value_heads": 0}, r"can be made of its settings \(ZeroDivisionError"),
        ({**LLAMA, "hidden_act": "foo"}, r"can be made of its settings \(KeyError: 'foo'\)"),
        ({**LLAMA, "eos_token_id": [1, 96]}, "eos_token_id 96 is none of the 96 tokens"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0 is not a whole number"),
        (
            {"model_type": "gemma3_text", "sliding_window": -4},
            "sliding_window -4 is not a whole number from 1",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            r"num_experts_per_tok 5 is not in 1\.\.4",
        ),
        (
            {"model_type": "deepseek_v3", "num_hidden_layers": 4, "n_routed_experts": 8},
            r"hold model\.layers\.3\.mlp\.gate\.e_score_correction_bias, which is no weight",
        ),
    ],
)
def test_what_is_no_backbone_is_refused_in_one_line(fields, fault):
    with pytest.raises(BackboneError, match=fault) as caught:
        make_config(fields)
    assert str(caught.value).startswith("backbone.config: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_random_backbone_of_a_recipe_is_placed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    blueprint = random_of("qwen3 moe")
    config = BackboneConfig(config=blueprint.raw, dtype="bfloat16")
    model = Engine({}, timeout_seconds=60).build(config, blueprint)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_a_plan_reads_the_text_model_of_one_that_sees(tmp_path, kind):
    small_seeing(kind).save_pretrained(tmp_path)
    planned = read_sizes(BackboneConfig(name=str(tmp_path)))
    opened = read_blueprint(BackboneConfig(name=str(tmp_path)))
    sizes = [on_meta(one.model_config) for one in (planned, opened)]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in sizes]
    assert shapes[0] == shapes[1]
