"""What transformers reads of a folder, for `finetune`, is what every other verb reads of it."""

import json

import pytest
import torch
from small_backbones import logits, stored
from small_t5 import CARD, small_t5

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.exchange import stock
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.t5 import EMBEDDING, EMBEDDING_ALIASES, GATED

CPU = torch.device("cpu")


@pytest.fixture
def both(build):
    """A folder's model as our loader fills it, and as transformers loads it."""

    def both(folder):
        config = BackboneConfig(name=str(folder), dtype="float32", fused_gelu=False)
        return build(name=str(folder)), stock.load_backbone(config, read_blueprint(config), CPU)

    return both


def answers(model):
    rows = [EncodedRow(torch.tensor(ids).numpy()) for ids in ([5, 6, 7, 1], [9, 1])]
    return GATED.generate(model, rows, device=CPU, num_beams=2, max_new_tokens=6, use_cache=True)


def assert_same(models):
    ours, theirs = models
    assert torch.equal(logits(ours), logits(theirs))
    assert answers(ours) == answers(theirs)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"pad_token_id": None},
        {"eos_token_id": None},
        {"decoder_start_token_id": None},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": None},
        {"return_dict": False},
        {"output_hidden_states": True, "output_attentions": True},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "eager"},
        {"num_beams": 4, "repetition_penalty": 3.0, "min_length": 4},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_a_configuration_is_read_alike(make, both, original, fields):
    assert_same(both(make(stored(original), {**CARD, **fields})))


def test_tensors_that_the_model_has_no_place_for_are_refused_as_elsewhere(make, original):
    """Transformers would leave them out, here the second block of either stack."""
    folder = make(stored(original), {**CARD, "num_layers": 1})
    config = BackboneConfig(name=str(folder), dtype="float32")
    with pytest.raises(BackboneError, match=r"unknown decoder\.block\.1\."):
        stock.load_backbone(config, read_blueprint(config), CPU)


def test_an_adapter_beside_the_backbone_is_refused(folder):
    """Transformers would load it too, without a word."""
    (folder / "adapter_config.json").write_text("{}")
    config = BackboneConfig(name=str(folder), dtype="float32")
    with pytest.raises(BackboneError, match="an adapter beside the backbone"):
        stock.load_backbone(config, read_blueprint(config), CPU)


def test_a_deeper_decoder_is_read_alike(make, both):
    original = small_t5(num_decoder_layers=4)
    assert_same(both(make(stored(original), {**CARD, "num_decoder_layers": 4})))


@pytest.mark.parametrize("names", [EMBEDDING_ALIASES, EMBEDDING_ALIASES[:1], EMBEDDING_ALIASES[1:]])
def test_an_embedding_by_another_name_is_read_alike(make, both, original, names):
    tensors = stored(original)
    embedding = tensors.pop(EMBEDDING)
    tensors |= {name: embedding.clone() for name in names}
    assert_same(both(make(tensors)))


def test_what_a_folder_says_of_generation_is_no_setting_of_a_run(folder, both):
    said = {"num_beams": 1, "repetition_penalty": 9.0, "eos_token_id": 196, "min_length": 5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert_same(both(folder))
