"""Backbones from folders and random weights: finding them, what they compute."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_backbones import KINDS, logits, message_of, random_source, stored, write_weights
from small_t5 import CARD, SIZES, WO, small_t5
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration

from mhr_scale.backbone.arranged import ArrangedSource
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.fingerprint import make as fingerprint_of
from mhr_scale.backbone.fingerprint import make_questions
from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.backbone.weights import PickledSource, SafetensorsSource
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.gradients import order_gradients
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.stored_names import Arrangement, Stored
from mhr_scale.families.t5 import GATED

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
    original = small_t5(tied=True, feed_forward_proj="relu")
    card = {**CARD, "feed_forward_proj": "relu", "tie_word_embeddings": True}
    folder = make(stored(original), card)
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


@pytest.mark.parametrize(
    "kind", ["safetensors", "bin", "bin in the old format", "random", "renamed", "joined"]
)
def test_a_range_of_a_tensor_is_a_slice_of_the_whole(tmp_path, kind):
    tensors = {"a.weight": torch.randn(7, 5), "b.weight": torch.randn(7, 5)}
    write_weights(tmp_path, tensors, kind)
    if kind in ("random", "renamed", "joined"):
        source = random_source({name: (7, 5) for name in ("copy", *tensors)})
        if kind == "renamed":
            source = ArrangedSource(source, Arrangement({"a.weight": Stored(("copy",))}))
        if kind == "joined":
            source = random_source({"x": (2, 5), "y": (5, 5), "b.weight": (7, 5)})
            source = ArrangedSource(source, Arrangement({"a.weight": Stored(("x", "y"))}))
            assert source.names() == tensors.keys()
            assert source.shape("a.weight") == (7, 5)
    else:
        reader = SafetensorsSource if kind == "safetensors" else PickledSource
        source = reader(list(tmp_path.iterdir()))
    for start, stop in ((0, 35), (0, 1), (3, 4), (5, 10), (6, 29), (34, 35)):
        source.read("b.weight", 0, 3)
        expected = source.read("a.weight", 0, 35)[start:stop].clone()
        source.read("b.weight", 0, 3)
        assert torch.equal(source.read("a.weight", start, stop), expected), (start, stop)


def test_a_range_of_a_vector_is_a_slice_of_it(tmp_path):
    vector = torch.arange(6.0)
    save_file({"a": vector}, tmp_path / "a.safetensors")
    for start, stop in ((0, 6), (2, 5)):
        read = SafetensorsSource([tmp_path / "a.safetensors"]).read("a", start, stop)
        assert torch.equal(read, vector[start:stop]), (start, stop)


def test_a_folder_without_a_start_token_starts_with_padding(make, original):
    card = {name: value for name, value in CARD.items() if name != "decoder_start_token_id"}
    folder = make(stored(original), card)
    blueprint = read_blueprint(BackboneConfig(name=str(folder)))
    assert blueprint.model_config.decoder_start_token_id == 0


@pytest.mark.parametrize(
    ("token", "value"), [("pad_token_id", 0), ("decoder_start_token_id", 0), ("eos_token_id", 1)]
)
def test_a_token_that_is_said_to_be_none_is_that_of_t5_and_that_is_said(
    make, original, caplog, token, value
):
    caplog.set_level("INFO", logger="mhr_scale")
    fields = {**SIZES, token: None}
    folder = make(stored(original), {**CARD, **fields})
    for config in (BackboneConfig(name=str(folder)), BackboneConfig(config=fields)):
        blueprint = read_blueprint(config)
        assert getattr(blueprint.model_config, token) == value
        asked = make_questions(blueprint, [[5, 6, 7], [8]])  # the shorter one is padded
        assert fingerprint_of(blueprint, asked).noise > 0
    assert caplog.messages == [
        f"{place}: {token} is null; {value} is used"
        for place in (folder / "config.json", "backbone.config")
    ]


def test_a_left_over_note_on_quantisation_is_not_used_and_that_is_said(
    make, build, original, caplog
):
    caplog.set_level("INFO", logger="mhr_scale")
    note = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    folder = make(stored(original), {**CARD, "quantization_config": note})
    assert torch.equal(logits(build(name=str(folder))), logits(original))
    assert caplog.messages[0] == (
        f"{folder / 'config.json'}: quantization_config is not used: the weights are not quantised"
    )


def test_a_blueprint_says_where_the_weights_are_from(folder):
    facts = read_blueprint(BackboneConfig(name=str(folder))).facts
    assert facts == {"name": str(folder), "revision": None, "folder": folder.name}


def test_a_blueprint_of_random_weights_says_how_to_make_them_again():
    facts = read_blueprint(BackboneConfig(config=SIZES, config_seed=3)).facts
    assert facts == {"name": None, "config": SIZES, "config_seed": 3}


# -- finding --------------------------------------------------------------------------------------


def test_a_name_that_can_only_be_a_folder_is_not_asked_of_the_hub():
    for name in ("./nowhere", "/nowhere", "~/nowhere", "a/b/nowhere", "builtin:tpy", "../nowhere"):
        message = message_of(BackboneConfig(name=name))
        assert message.startswith(f"backbone.name: no folder '{name}' ")


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


# -- generating -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_decoder_deeper_or_shallower_than_the_encoder_generates(make, build, depth, beams):
    """Against transformers without a cache."""
    original = small_t5(num_decoder_layers=depth)
    model = build(name=str(make(stored(original), {**CARD, "num_decoder_layers": depth})))
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 6}
    ids = torch.tensor([[5, 6, 7, 8, 9, 1]])
    rows = [EncodedRow(ids[0].numpy())]
    found = GATED.generate(model, rows, device=ids.device, use_cache=True, **options)
    expected = original.generate(ids, use_cache=False, **options).tolist()
    assert found == expected
    packed = GATED.pack(rows, model.config)
    GATED.run_generation(model, packed, beams=beams, new_tokens=2)


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
    model = small_t5()
    order_gradients(model, GATED)
    assert torch.equal(logits(model), logits(original))


def test_ordering_gradients_changes_them_by_rounding_only(original):
    model = small_t5()
    order_gradients(model, GATED)
    torch.testing.assert_close(
        input_gradient(model)[1], input_gradient(original)[1], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_recomputing_activations_leaves_loss_and_gradient_as_they_are(build, folder, mode):
    plain = input_gradient(build(name=str(folder)), train=True)
    again = input_gradient(build(name=str(folder), recompute=mode), train=True)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "passes"), [("none", 1), ("reentrant", 2), ("non_reentrant", 2)])
def test_a_block_runs_forward_again_where_activations_are_recomputed(build, folder, mode, passes):
    model = build(name=str(folder), recompute=mode)
    seen = []
    model.encoder.block[1].layer[0].register_forward_pre_hook(lambda *_: seen.append(1))
    input_gradient(model, train=True)
    assert len(seen) == passes
