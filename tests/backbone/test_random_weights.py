"""Random weights follow from names and a seed, and spread as those of T5 do."""

import pytest
import torch
from small_backbones import logits, message_of, random_source
from small_t5 import SIZES, WO
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.config import BackboneConfig
from mhr_scale.seeds import seed_from


def whole(source, name):
    return source.read(name, 0, source.shape(name)[0] * source.shape(name)[1])


def test_a_random_tensor_follows_from_its_name_and_the_seed_alone():
    alone = random_source({WO: (8, 8)})
    among_others = random_source({"shared.weight": (4, 4), WO: (8, 8)})
    whole(among_others, "shared.weight")
    assert torch.equal(whole(alone, WO), whole(among_others, WO))


def test_random_tensors_of_other_names_differ():
    other = WO.replace("encoder", "decoder")
    source = random_source({WO: (8, 8), other: (8, 8)})
    assert not torch.equal(whole(source, WO), whole(source, other))


def test_random_tensors_of_other_seeds_differ():
    one, two = (random_source({WO: (8, 8)}, seed=seed) for seed in (0, 1))
    assert not torch.equal(whole(one, WO), whole(two, WO))


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize(
    ("last", "std"),
    [
        ("q", (16 * 4) ** -0.5),
        ("k", 16**-0.5),
        ("v", 16**-0.5),
        ("o", (2 * 4) ** -0.5),
        ("wi", 16**-0.5),
        ("wi_0", 16**-0.5),
        ("wi_1", 16**-0.5),
        ("wo", 24**-0.5),
        ("relative_attention_bias", 16**-0.5),
        ("shared", 1.0),
        ("lm_head", 1.0),
    ],
)
def test_random_tensors_have_the_spread_of_t5s_rules(last, std, factor):
    name = f"block.0.{last}.weight"
    source = random_source({name: (300, 300)}, initializer_factor=factor)
    assert whole(source, name).std().item() == pytest.approx(factor * std, rel=0.02)


def test_random_layer_norms_are_the_initial_factor():
    source = random_source({"final_layer_norm.weight": (8,)}, initializer_factor=0.5)
    assert source.read("final_layer_norm.weight", 0, 8).tolist() == [0.5] * 8


def test_random_weights_spread_like_those_of_transformers(build):
    sizes = {**SIZES, "d_model": 64, "d_kv": 16, "d_ff": 96, "vocab_size": 100}
    ours = build(config={**sizes, "tie_word_embeddings": True})
    theirs = dict(T5ForConditionalGeneration(T5Config(**sizes)).named_parameters())
    for name, tensor in ours.named_parameters():
        if tensor.numel() > 1000:
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_have_a_head_of_their_own_unless_tied(build, tied):
    model = build(config={**SIZES, "tie_word_embeddings": tied})
    assert (model.lm_head.weight is model.shared.weight) == tied


def test_random_weights_are_tied_by_default(build):
    model = build(config=SIZES)
    assert model.lm_head.weight is model.shared.weight


def test_the_same_config_and_seed_give_the_same_model(build):
    assert torch.equal(logits(build(config=SIZES)), logits(build(config=SIZES)))


def test_another_seed_gives_another_model(build):
    assert not torch.equal(logits(build(config=SIZES)), logits(build(config=SIZES, config_seed=1)))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("d_modl", 16, "backbone.config: T5 has no setting 'd_modl'; did you mean 'd_model'?"),
        ("hidden_dropout", 0.1, "backbone.config: T5 has no setting 'hidden_dropout'"),
        ("d_model", "wide", "backbone.config: Validation error for field 'd_model': TypeError: "),
        ("d_model", 0, "backbone.config: d_model 0 is not at least 1"),
        ("num_decoder_layers", -1, "backbone.config: num_decoder_layers -1 is not at least 1"),
        ("dropout_rate", 1.5, "backbone.config: dropout_rate 1.5 is not in [0, 1)"),
        (
            "feed_forward_proj",
            "gelo",
            "backbone.config: feed_forward_proj: no activation 'gelo'; did you mean 'gelu'?",
        ),
    ],
)
def test_a_configuration_no_t5_has_is_refused(field, value, expected):
    assert message_of(BackboneConfig(config={**SIZES, field: value})).startswith(expected)


def test_every_name_has_a_seed_of_its_own_even_one_that_is_no_text():
    assert len({seed_from("backbone", 0, name) for name in ("a", "b", "\ud800", "\ud801")}) == 4
