import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from mhr_scale import backbone
from mhr_scale.backbone import BUILTIN, EMBEDDING_ALIASES, load_tokenizer, read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.engine import Engine
from mhr_scale.errors import BackboneError
from mhr_scale.weights import PickledSource, RandomSource, SafetensorsSource

SIZES = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 384,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
}
CARD = {**SIZES, "model_type": "t5", "tie_word_embeddings": False}
WO = "encoder.block.1.layer.1.DenseReluDense.wo.weight"


def transformers_model(**changes):
    """A plain model with random weights, its head untied by hand where the config says so."""
    torch.manual_seed(1)
    fields = {**SIZES, "tie_word_embeddings": False, **changes}
    model = T5ForConditionalGeneration(T5Config(**fields))
    if fields["tie_word_embeddings"] is False:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model.eval()


def stored(model):
    """State of a model as checkpoints hold it: each tied tensor once."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    drop = set(EMBEDDING_ALIASES)
    if model.lm_head.weight is model.shared.weight:
        drop.add("lm_head.weight")
    return {name: tensor for name, tensor in state.items() if name not in drop}


def halves(tensors):
    names = sorted(tensors)
    middle = len(names) // 2
    return [{name: tensors[name] for name in part} for part in (names[:middle], names[middle:])]


def write_weights(folder, tensors, kind="safetensors"):
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "safetensors shards":
        for number, half in enumerate(halves(tensors), 1):
            save_file(half, folder / f"model-0000{number}-of-00002.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "bin shards":
        for number, half in enumerate(halves(tensors), 1):
            torch.save(half, folder / f"pytorch_model-0000{number}-of-00002.bin")
    elif kind == "bin in the old format":
        file = folder / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=False)


KINDS = ("safetensors", "safetensors shards", "bin", "bin shards", "bin in the old format")


@pytest.fixture
def make(tmp_path):
    """Makes a backbone folder: configuration and weights."""

    def make(tensors, card=CARD, kind="safetensors"):
        folder = tmp_path / "backbone"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(card))
        write_weights(folder, tensors, kind)
        return folder

    return make


@pytest.fixture(scope="module")
def original():
    return transformers_model()


@pytest.fixture
def folder(make, original):
    return make(stored(original))


@pytest.fixture
def build(monkeypatch):
    """Builds a backbone as a verb does, on CPU; transformers' own gelu, to compare bit for bit."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def build(**settings):
        config = BackboneConfig(**{"dtype": "float32", "fused_gelu": False, **settings})
        return Engine({}, timeout_seconds=60).build(config, read_blueprint(config))

    return build


def logits(model):
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, 300, (2, 9), generator=generator)
    labels = torch.randint(3, 300, (2, 5), generator=generator)
    with torch.no_grad():
        return model(input_ids=input_ids, labels=labels).logits


def message_of(config):
    with pytest.raises(BackboneError) as caught:
        read_blueprint(config)
    return one_line(caught)


def one_line(caught):
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# -- random weights -------------------------------------------------------------------------------


def random_source(shapes, *, seed=0, **changes):
    return RandomSource(T5Config(**{**SIZES, **changes}), shapes, seed)


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


# -- weights from a folder ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_a_folder_computes_what_the_original_computes(make, build, original, kind):
    folder = make(stored(original), kind=kind)
    assert torch.equal(logits(build(name=str(folder))), logits(original))


def test_a_folder_saved_by_transformers_computes_what_the_original_computes(
    tmp_path, build, original
):
    """Its config.json says `tie_word_embeddings: true` whatever the model has."""
    original.save_pretrained(tmp_path)
    assert torch.equal(logits(build(name=str(tmp_path))), logits(original))


def test_an_ungated_tied_model_computes_what_the_original_computes(make, build):
    changes = {"feed_forward_proj": "relu", "tie_word_embeddings": True}
    original = transformers_model(**changes)
    folder = make(stored(original), {**CARD, **changes})
    assert torch.equal(logits(build(name=str(folder))), logits(original))


def test_an_mt5_model_computes_what_the_original_computes(make, build):
    original = MT5ForConditionalGeneration(MT5Config(**SIZES)).eval()
    original.lm_head.weight = nn.Parameter(torch.randn_like(original.lm_head.weight))
    folder = make(stored(original), {**CARD, "model_type": "mt5"})
    assert torch.equal(logits(build(name=str(folder))), logits(original))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_converted_from_the_checkpoints_type(make, build, original, dtype):
    folder = make({name: tensor.to(dtype) for name, tensor in stored(original).items()})
    weight = build(name=str(folder)).get_parameter(WO)
    assert torch.equal(weight, original.get_parameter(WO).to(dtype).float())


def test_safetensors_are_preferred_to_bin(make, build, original):
    folder = make(stored(original))
    torch.save({"other.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert torch.equal(logits(build(name=str(folder))), logits(original))


def test_the_builtin_backbone_builds(build):
    model = build(name="builtin:toy")
    expected = load_file(BUILTIN["builtin:toy"] / "model.safetensors")["shared.weight"]
    assert torch.equal(model.shared.weight, expected.float())


@pytest.mark.parametrize(("start", "stop"), [(0, 35), (0, 1), (3, 4), (5, 10), (6, 29), (34, 35)])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin in the old format", "random"])
def test_a_range_of_a_tensor_is_a_slice_of_the_whole(tmp_path, kind, start, stop):
    tensors = {"a.weight": torch.randn(7, 5), "b.weight": torch.randn(7, 5)}
    write_weights(tmp_path, tensors, kind)
    if kind == "random":
        source = random_source({name: (7, 5) for name in tensors})
    else:
        reader = SafetensorsSource if kind == "safetensors" else PickledSource
        source = reader(list(tmp_path.iterdir()))
    source.read("b.weight", 0, 3)
    expected = source.read("a.weight", 0, 35)[start:stop].clone()
    source.read("b.weight", 0, 3)
    assert torch.equal(source.read("a.weight", start, stop), expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 5)])
def test_a_range_of_a_vector_is_a_slice_of_it(tmp_path, start, stop):
    vector = torch.arange(6.0)
    save_file({"a": vector}, tmp_path / "a.safetensors")
    read = SafetensorsSource([tmp_path / "a.safetensors"]).read("a", start, stop)
    assert torch.equal(read, vector[start:stop])


def test_a_folder_without_a_start_token_starts_with_padding(make, original):
    card = {name: value for name, value in CARD.items() if name != "decoder_start_token_id"}
    folder = make(stored(original), card)
    blueprint = read_blueprint(BackboneConfig(name=str(folder)))
    assert blueprint.model_config.decoder_start_token_id == 0


def test_a_blueprint_says_where_the_weights_are_from(folder):
    facts = read_blueprint(BackboneConfig(name=str(folder))).facts
    assert facts == {"name": str(folder), "revision": None, "folder": folder.name}


def test_a_blueprint_of_random_weights_says_how_to_make_them_again():
    facts = read_blueprint(BackboneConfig(config=SIZES, config_seed=3)).facts
    assert facts == {"name": None, "config": SIZES, "config_seed": 3}


# -- ties -----------------------------------------------------------------------------------------

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
    tensors = stored(transformers_model(**sizes))
    tensors["lm_head.weight"] = tensors["shared.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1.0
    folder = make(tensors, {**CARD, **sizes, "tie_word_embeddings": True})
    assert not read_blueprint(BackboneConfig(name=str(folder))).is_lm_head_tied


@pytest.mark.parametrize("tied", [True, False])
def test_encoder_and_decoder_read_one_embedding(build, tied):
    model = build(config={**SIZES, "tie_word_embeddings": tied})
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.decoder.embed_tokens.weight is model.shared.weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_own_configuration_tells_the_tie(build, tied):
    assert build(config={**SIZES, "tie_word_embeddings": tied}).config.tie_word_embeddings == tied


def test_copies_of_the_embedding_in_a_checkpoint_are_ignored(make, build, original):
    copies = {name: torch.zeros(384, 16) for name in EMBEDDING_ALIASES}
    folder = make({**stored(original), **copies})
    assert torch.equal(logits(build(name=str(folder))), logits(original))


def test_the_unused_position_bias_of_old_checkpoints_is_ignored(make, build, original):
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    folder = make({**stored(original), name: torch.zeros(32, 2)})
    assert torch.equal(logits(build(name=str(folder))), logits(original))


# -- damaged and foreign folders ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop(WO), f"1 fault(s): missing {WO}"),
        (lambda tensors: tensors.pop("shared.weight"), "1 fault(s): missing shared.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 fault(s): unknown extra"),
        (
            lambda tensors: tensors.update({WO: torch.zeros(24, 16)}),
            f"1 fault(s): {WO} is [24, 16], the model wants [16, 24]",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(380, 16)}),
            "1 fault(s): lm_head.weight is [380, 16], the model wants [384, 16]",
        ),
        (lambda tensors: tensors.clear(), "holds no tensor; fetch it again"),
    ],
    ids=["missing", "no embedding", "unknown", "shape", "head shape", "nothing"],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(
    make, build, original, kind, change, expected
):
    tensors = stored(original)
    change(tensors)
    folder = make(tensors, kind=kind)
    with pytest.raises(BackboneError) as caught:
        build(name=str(folder))
    assert expected in one_line(caught)


def test_a_long_list_of_faults_is_cut(make, build, original):
    tensors = {name: torch.zeros(1) for name in stored(original)}
    folder = make(tensors)
    with pytest.raises(BackboneError) as caught:
        build(name=str(folder))
    message = one_line(caught)
    assert f"{len(tensors)} fault(s): " in message
    assert message.count("the model wants") == 5


def cut(n_bytes):
    return lambda file: file.write_bytes(file.read_bytes()[:-n_bytes])


def content(data):
    return lambda file: file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [cut(100), lambda file: file.write_bytes(file.read_bytes()[:50]), content(b""), content(b"x")],
    ids=["end cut off", "header cut off", "empty", "one byte"],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_damaged_file_of_weights_is_named(make, original, kind, damage):
    folder = make(stored(original), kind=kind)
    (file,) = (path for path in folder.iterdir() if path.name != "config.json")
    damage(file)
    assert message_of(BackboneConfig(name=str(folder))).startswith(f"{file}: not a ")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        pickle.dumps(len, protocol=2),
    ],
    ids=["pointer to a large file", "pickled code"],
)
def test_a_file_that_is_no_checkpoint_is_named(make, name, data):
    folder = make({}, kind="none")
    (folder / name).write_bytes(data)
    assert message_of(BackboneConfig(name=str(folder))).startswith(f"{folder / name}: not a ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "holds a list, not named tensors"),
        (torch.zeros(1), "holds a Tensor, not named tensors"),
        ({"state_dict": {"a": torch.zeros(1)}}, "'state_dict' is no tensor"),
        ({"a": nn.Linear(1, 1)}, "not a checkpoint of tensors alone"),
    ],
)
def test_a_bin_file_of_something_else_is_named(make, content, expected):
    folder = make(content, kind="bin")
    file = folder / "pytorch_model.bin"
    assert message_of(BackboneConfig(name=str(folder))) == f"{file}: {expected}"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('{\n"d_model": ', "config.json:2: not JSON (Expecting value)"),
        (b"\xff\xfe", "config.json: not UTF-8 text (invalid start byte)"),
        ("[]", "config.json: not a JSON object"),
        ("{}", ": a backbone of type 'None'; known: ('t5', 'mt5')"),
        ('{"model_type": "bert"}', ": a backbone of type 'bert'; known: ('t5', 'mt5')"),
        ({**CARD, "num_layers": "two"}, "config.json: Validation error for field 'num_layers'"),
        ({**CARD, "num_heads": 0}, "config.json: num_heads 0 is not at least 1"),
        ({**CARD, "feed_forward_proj": "x"}, "config.json: feed_forward_proj: no activation 'x'"),
        ({**CARD, "feed_forward_proj": "a-b-c"}, "config.json: "),
    ],
)
def test_a_configuration_that_cannot_be_used_names_its_file(folder, data, expected):
    text = json.dumps(data) if isinstance(data, dict) else data
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = message_of(BackboneConfig(name=str(folder)))
    assert message.startswith(str(folder))
    assert expected in message


def test_a_folder_without_a_configuration_is_no_backbone(folder):
    (folder / "config.json").unlink()
    assert message_of(BackboneConfig(name=str(folder))) == (
        f"{folder}: not a backbone folder (no config.json here)"
    )


def test_a_folder_without_weights_says_what_is_looked_for(folder):
    (folder / "model.safetensors").unlink()
    assert message_of(BackboneConfig(name=str(folder))) == (
        f"{folder}: no *.safetensors and no pytorch_model*.bin here"
    )


# -- finding --------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/nowhere", "builtin:tpy", "../x"]
)
def test_a_name_that_can_only_be_a_folder_is_not_asked_of_the_hub(name):
    message = message_of(BackboneConfig(name=name))
    assert message.startswith(f"backbone.name: no folder '{name}' (looked in ")


@pytest.mark.usefixtures("offline")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "nothing-at-all"])
def test_a_name_the_hub_does_not_give_is_refused(name):
    message = message_of(BackboneConfig(name=name))
    assert message.startswith(f"backbone.name: '{name}' is no local folder and the hub does not")


def test_every_refusal_of_a_name_tells_what_can_be_named():
    assert message_of(BackboneConfig(name="./x")).endswith("give a folder, a hub id or builtin:toy")


def test_a_relative_folder_is_found(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert read_blueprint(BackboneConfig(name=folder.name)).folder.resolve() == folder


# -- tokenizers -----------------------------------------------------------------------------------


def tokenizer_of(**settings):
    config = BackboneConfig(**settings)
    return load_tokenizer(config, read_blueprint(config))


def tokenizer_error(**settings):
    with pytest.raises(BackboneError) as caught:
        tokenizer_of(**settings)
    return one_line(caught)


def test_random_weights_read_bytes():
    assert type(tokenizer_of(config=SIZES)).__name__ == "ByT5Tokenizer"


def test_a_folder_may_be_told_to_read_bytes(folder):
    assert type(tokenizer_of(name=str(folder), tokenizer="byt5")).__name__ == "ByT5Tokenizer"


def test_a_backbone_brings_its_own_tokenizer():
    assert len(tokenizer_of(name="builtin:toy")) == 50


def test_another_folders_tokenizer_may_be_named():
    assert len(tokenizer_of(config=SIZES, tokenizer="builtin:toy")) == 50


def test_a_folder_of_a_byte_model_needs_no_tokenizer_files(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert type(tokenizer_of(name=str(folder))).__name__ == "ByT5Tokenizer"


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "T5Tokenizer"}])
def test_a_folder_without_tokenizer_files_is_refused(folder, config):
    """Transformers would make a tokenizer that knows no words."""
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_error(name=str(folder)) == (
        f"{folder}: no tokenizer here (spiece.model or tokenizer.json); set backbone.tokenizer"
    )


def test_a_broken_tokenizer_file_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    message = tokenizer_error(name=str(folder))
    assert message.startswith(f"{folder}: no readable tokenizer (")


def test_a_tokenizer_with_more_pieces_than_the_embedding_is_refused():
    config = {**SIZES, "vocab_size": 383}
    assert tokenizer_error(config=config) == (
        "backbone.tokenizer: 384 pieces, the backbone embeds only 383; "
        "choose the backbone's own tokenizer"
    )


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_tokenizer_without_padding_or_ending_is_refused(tmp_path, token):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN["builtin:toy"] / file, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings[token]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    message = tokenizer_error(config=SIZES, tokenizer=str(tmp_path))
    assert message.startswith(f"backbone.tokenizer: has no {token}")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing-at-all"])
def test_a_missing_tokenizer_is_not_blamed_on_the_backbones_name(name):
    message = tokenizer_error(config=SIZES, tokenizer=name)
    assert message.startswith("backbone.tokenizer: ")


# -- the built model ------------------------------------------------------------------------------


def dropout_rates(model):
    """Rates of dropout modules, and of attentions, which apply theirs themselves."""
    modules = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    attentions = {
        module.dropout
        for module in model.modules()
        if type(module).__name__.endswith("T5Attention")
    }
    return modules, attentions


@pytest.mark.parametrize(("rate", "expected"), [(0.3, 0.3), (0.0, 0.0), (None, 0.1)])
def test_dropout_is_set_in_modules_and_attentions(build, folder, rate, expected):
    assert dropout_rates(build(name=str(folder), dropout=rate)) == ({expected}, {expected})


def test_without_dropout_training_mode_computes_what_evaluation_computes(build, folder):
    model = build(name=str(folder), dropout=0.0)
    assert torch.equal(logits(model.train()), logits(model.eval()))


def test_with_dropout_training_mode_draws_numbers(build, folder):
    model = build(name=str(folder), dropout=0.3).train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("source", ["folder", "random"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_have_the_recipes_type(build, folder, dtype, source):
    given = {"name": str(folder)} if source == "folder" else {"config": SIZES}
    model = build(**given, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_all_weights_are_frozen(build, folder):
    assert not any(weight.requires_grad for weight in build(name=str(folder)).parameters())


def test_a_built_model_is_in_evaluation_mode(build, folder):
    assert not any(module.training for module in build(name=str(folder)).modules())


def input_gradient(model, train=False):
    """Gradient of a scalar at the embedded input, and that scalar."""
    model.train(train)
    generator = torch.Generator().manual_seed(3)
    embedded = torch.randn(2, 6, 16, generator=generator, requires_grad=True)
    labels = torch.randint(3, 300, (2, 4), generator=generator)
    loss = model(inputs_embeds=embedded, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), embedded.grad


def test_ordering_gradients_leaves_the_output_as_it_is(original):
    model = transformers_model()
    backbone.order_gradients(model)
    assert torch.equal(logits(model), logits(original))


def test_ordering_gradients_changes_them_by_rounding_only(original):
    model = transformers_model()
    backbone.order_gradients(model)
    torch.testing.assert_close(
        input_gradient(model)[1], input_gradient(original)[1], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_recomputing_activations_leaves_loss_and_gradient_as_they_are(build, folder, mode):
    plain = input_gradient(build(name=str(folder)), train=True)
    again = input_gradient(build(name=str(folder), recompute=mode), train=True)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("mode", "passes"), [("none", 1), ("reentrant", 2), ("non_reentrant", 2)])
def test_a_block_runs_forward_again_where_activations_are_recomputed(build, folder, mode, passes):
    model = build(name=str(folder), recompute=mode)
    seen = []
    model.encoder.block[1].layer[0].register_forward_pre_hook(lambda *_: seen.append(1))
    input_gradient(model, train=True)
    assert len(seen) == passes
