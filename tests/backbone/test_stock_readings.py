"""What transformers reads of a folder, for `finetune`, is what every other verb reads of it.

Also when it gets the tensors of mapped files instead of the folder, for `convert`.
"""

import json

import pytest
import torch
import transformers
from small_backbones import logits, stored
from small_t5 import CARD, HEAD, WO, small_t5, tensors_of, write_folder

from mhr_scale.backbone import fingerprint
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
        config = BackboneConfig(name=str(folder), dtype="float32", mapped=False)
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


# -- mapped files instead of a folder --------------------------------------------------------------


def same_type(tensors):
    return tensors


def without_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def with_copies_alone(tensors):
    """As MADLAD has its embedding."""
    return {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}


def half(tensors):
    """Of float16 transformers casts every `wo` when it may."""
    return {name: tensor.half() for name, tensor in tensors.items()}


def mixed(tensors):
    return {
        n: t.bfloat16() if n == WO else t.half() if ".k." in n else t for n, t in tensors.items()
    }


SILENT = {name: value for name, value in CARD.items() if name != "tie_word_embeddings"}
#: What the model, the checkpoint and the configuration are.
BACKBONES = {
    "untied": (False, same_type, CARD),
    "untied, as T0 says it": (False, same_type, SILENT),
    "tied": (True, without_head, {**CARD, "tie_word_embeddings": True}),
    "tied, with both": (True, same_type, SILENT),
    "mT5": (False, same_type, {**CARD, "model_type": "mt5"}),
    "mT5, tied": (True, without_head, {**SILENT, "model_type": "mt5"}),
    "copies alone": (False, with_copies_alone, CARD),
    "float16": (False, half, CARD),
    "several types": (False, mixed, CARD),
}


def ties_of(model):
    """Names of parameters by their tensor."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(groups.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("what", BACKBONES)
@pytest.mark.parametrize(
    ("kind", "shards"), [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)]
)
def test_mapped_files_are_read_as_their_folder(tmp_path, kind, shards, what, dtype):
    is_tied, change, card = BACKBONES[what]
    tensors = change(tensors_of(small_t5(tied=is_tied)))
    folder = write_folder(tmp_path / "folder", tensors, kind=kind, shards=shards, card=card)
    config = BackboneConfig(name=str(folder), dtype=dtype)
    blueprint, number = read_blueprint(config), getattr(torch, dtype)
    mapped = stock.map_backbone(config, blueprint)
    expected = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=number)
    assert type(mapped) is type(expected)
    assert ties_of(mapped) == ties_of(expected)
    cast = {name: p.to(number) for name, p in mapped.named_parameters()}
    assert all(torch.equal(cast[name], p.to(number)) for name, p in expected.named_parameters())
    questions = fingerprint.make_questions(blueprint)
    found = fingerprint.ask_model(mapped, blueprint.family, questions, dtype=number)
    expected = fingerprint.ask(expected.float(), blueprint.family, questions, CPU)
    assert found == expected


@pytest.mark.parametrize(
    ("dtype", "mapped", "is_mapped"),
    [("float32", True, True), ("float32", False, False), ("bfloat16", True, False)],
)
def test_a_backbone_to_fine_tune_is_mapped_where_its_files_hold_its_data_type(
    tmp_path, dtype, mapped, is_mapped
):
    folder = write_folder(tmp_path / "folder", tensors_of(small_t5()), shards=3)
    config = BackboneConfig(name=str(folder), dtype=dtype, mapped=mapped)
    blueprint = read_blueprint(config)
    model = stock.load_backbone(config, blueprint, CPU)
    views = {blueprint.source.view(name).data_ptr() for name in blueprint.source.names()}
    assert {p.data_ptr() in views for p in model.parameters()} == {is_mapped}
    assert not model.training
    plain = _loaded(folder, getattr(torch, dtype))
    assert torch.equal(logits(model), logits(plain))


def _loaded(folder, dtype):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("change", [same_type, half, mixed])
def test_no_weight_of_a_mapped_file_is_copied(tmp_path, change):
    folder = write_folder(tmp_path / "folder", change(tensors_of(small_t5())), shards=3)
    config = BackboneConfig(name=str(folder))
    blueprint = read_blueprint(config)
    model = stock.map_backbone(config, blueprint)
    for name, parameter in model.named_parameters():
        view = blueprint.source.view(name)
        assert (parameter.data_ptr(), parameter.dtype) == (view.data_ptr(), view.dtype)
        assert type(parameter) is torch.nn.Parameter
        assert type(parameter.data) is torch.Tensor


def test_tensors_go_in_by_their_names_in_the_files(tmp_path, monkeypatch):
    """So that transformers finds the embedding by itself."""
    tensors = with_copies_alone(tensors_of(small_t5()))
    folder = write_folder(tmp_path / "folder", tensors)
    original, given = stock._load, {}

    def load(kind, place, config, blueprint, options):
        given.update(options)
        return original(kind, place, config, blueprint, options)

    monkeypatch.setattr(stock, "_load", load)
    config = BackboneConfig(name=str(folder))
    stock.map_backbone(config, read_blueprint(config))
    assert given["state_dict"].keys() == tensors.keys()


def test_a_tensor_that_is_missing_for_transformers_is_refused(folder, monkeypatch):
    """Its own names decide, not ours."""
    config = BackboneConfig(name=str(folder))
    blueprint = read_blueprint(config)
    source = blueprint.source
    views = {n.replace(WO, "elsewhere"): source.view(n) for n in source.names()}
    monkeypatch.setattr(type(source), "views", lambda self, name: views)
    with pytest.raises(BackboneError, match=f"does not fill the model: {WO}; fetch it again"):
        stock.map_backbone(config, blueprint)


def test_a_head_that_transformers_ties_and_the_checkpoint_does_not_is_refused(folder, monkeypatch):
    kind = transformers.T5ForConditionalGeneration
    original = kind.tie_weights

    def tie(self, *arguments, **options):
        original(self, *arguments, **options)
        self.lm_head.weight = self.shared.weight

    monkeypatch.setattr(kind, "tie_weights", tie)
    config = BackboneConfig(name=str(folder))
    with pytest.raises(BackboneError, match=r"transformers has tied lm_head\.weight of "):
        stock.map_backbone(config, read_blueprint(config))
