"""The checkpoint decides whether the head is tied to the embedding."""

from itertools import combinations

import pytest
import torch
from small_backbones import logits, message_of, stored
from small_t5 import CARD, SIZES, small_t5
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.families.t5 import EMBEDDING, EMBEDDING_ALIASES, HEAD

TIES = [
    # the configuration says tied | lm_head in the checkpoint | so it is tied
    pytest.param(False, "own", False, id="said untied, own head"),
    pytest.param(False, "copy", False, id="said untied, equal head"),
    pytest.param(False, "none", True, id="said untied, no head"),
    pytest.param(True, "own", False, id="said tied, own head"),
    pytest.param(True, "copy", True, id="said tied, equal head"),
    pytest.param(True, "none", True, id="said tied, no head"),
    pytest.param(None, "own", False, id="nothing said, own head"),
    pytest.param(None, "none", True, id="nothing said, no head"),
]


def tensors_and_card(original, says_tied, head):
    tensors, card = stored(original), dict(CARD)
    card.pop("tie_word_embeddings")
    if says_tied is not None:
        card["tie_word_embeddings"] = says_tied
    if head == "copy":
        tensors["lm_head.weight"] = tensors["shared.weight"].clone()
    elif head == "none":
        del tensors["lm_head.weight"]
    return tensors, card


@pytest.mark.parametrize(("says_tied", "head", "is_tied"), TIES)
def test_the_checkpoint_decides_whether_the_head_is_tied(
    make, build, original, says_tied, head, is_tied
):
    model = build(name=str(make(*tensors_and_card(original, says_tied, head))))
    assert (model.lm_head.weight is model.shared.weight) == is_tied


@pytest.mark.parametrize(("says_tied", "head", "is_tied"), TIES)
def test_a_tie_does_not_change_what_is_computed(make, build, original, says_tied, head, is_tied):
    tensors, card = tensors_and_card(original, says_tied, head)
    fields = {name: value for name, value in card.items() if name != "model_type"}
    expected = T5ForConditionalGeneration(T5Config(**fields)).eval()
    head_weight = tensors.get("lm_head.weight", tensors["shared.weight"])
    expected.lm_head.weight = nn.Parameter(head_weight.clone())
    aliases = dict.fromkeys(EMBEDDING_ALIASES, tensors["shared.weight"])
    expected.load_state_dict({"lm_head.weight": head_weight, **tensors, **aliases})
    assert torch.equal(logits(build(name=str(make(tensors, card)))), logits(expected))


@pytest.mark.parametrize("says_tied", [True, False])
def test_an_own_head_gives_the_logits_of_a_plain_load_by_transformers(
    make, build, original, says_tied
):
    folder = make(*tensors_and_card(original, says_tied, "own"))
    plain = T5ForConditionalGeneration.from_pretrained(folder).eval()
    assert torch.equal(logits(build(name=str(folder))), logits(plain))


def test_a_head_that_differs_in_its_last_number_only_is_untied(make):
    sizes = {"vocab_size": 2500, "d_model": 4}
    tensors = stored(small_t5(**sizes))
    tensors["lm_head.weight"] = tensors["shared.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1.0
    folder = make(tensors, {**CARD, **sizes, "tie_word_embeddings": True})
    assert HEAD not in read_blueprint(BackboneConfig(name=str(folder))).ties


@pytest.mark.parametrize("tied", [True, False])
def test_encoder_and_decoder_read_one_embedding(build, tied):
    model = build(config={**SIZES, "tie_word_embeddings": tied})
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.decoder.embed_tokens.weight is model.shared.weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_own_configuration_tells_the_tie(build, tied):
    assert build(config={**SIZES, "tie_word_embeddings": tied}).config.tie_word_embeddings == tied


@pytest.mark.parametrize("names", [EMBEDDING_ALIASES, EMBEDDING_ALIASES[:1], EMBEDDING_ALIASES[1:]])
@pytest.mark.parametrize("beside_it", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_embedding_may_go_by_the_names_of_its_copies(
    make, build, original, names, beside_it, kind
):
    tensors = stored(original)
    embedding = tensors[EMBEDDING] if beside_it else tensors.pop(EMBEDDING)
    for name in names:
        tensors[name] = embedding.clone() if kind == "safetensors" else embedding
    folder = make(tensors, kind=kind)
    assert torch.equal(logits(build(name=str(folder))), logits(original))


def test_a_tied_head_alone_is_the_embedding(make, build, original):
    tensors = stored(original)
    del tensors[EMBEDDING]
    model = build(name=str(make(tensors, {**CARD, "tie_word_embeddings": True})))
    assert model.shared.weight is model.lm_head.weight
    assert torch.equal(model.shared.weight, original.lm_head.weight)


def test_an_untied_head_alone_is_not_the_embedding(make, build, original):
    tensors = stored(original)
    del tensors[EMBEDDING]
    with pytest.raises(BackboneError, match=r"missing shared\.weight"):
        build(name=str(make(tensors)))


@pytest.mark.parametrize(("name", "beside"), [*combinations((*EMBEDDING_ALIASES, EMBEDDING), 2)])
def test_a_copy_of_the_embedding_that_differs_is_refused_however_it_is_opened(
    make, original, name, beside
):
    tensors = stored(original)
    tensors[beside] = tensors.pop(EMBEDDING)
    tensors[name] = tensors[beside].clone()
    tensors[name][-1, -1] += 1.0
    message = message_of(BackboneConfig(name=str(make(tensors))))
    assert " differs from " in message
    assert name in message
    assert beside in message
    assert message.endswith(
        "the model has one tensor for both; leave out the one that was not trained"
    )


def test_copies_of_an_embedding_that_is_not_all_numbers_are_equal(make, original):
    tensors = stored(original)
    tensors[EMBEDDING][0, 0] = float("nan")
    tensors[EMBEDDING_ALIASES[0]] = tensors[EMBEDDING].clone()
    assert EMBEDDING_ALIASES[0] in read_blueprint(BackboneConfig(name=str(make(tensors)))).ties


def test_the_unused_position_bias_of_old_checkpoints_is_ignored(make, build, original):
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    folder = make({**stored(original), name: torch.zeros(32, 2)})
    assert torch.equal(logits(build(name=str(folder))), logits(original))
