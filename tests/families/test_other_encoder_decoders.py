"""umT5 and T5Gemma: packed answers, generation and adapters against transformers and stock PEFT."""

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from placed import place_model
from transformers import (
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from mhr_scale import AdapterConfig, attach
from mhr_scale.adapters import find_sites, peft_folders
from mhr_scale.adapters.sites import recognise_sites
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.table import FAMILIES, complete, find_family, make_config

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

T5_SIZES = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def stack(width, n_layers):
    """Sizes of a T5Gemma's stack; the two of a model may differ in width."""
    return {
        "vocab_size": 96,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "attn_logit_softcapping": 20.0,
    }


GEMMA = {"encoder": stack(32, 3), "decoder": stack(64, 2), "vocab_size": 96}
MODELS = {
    "umt5": (UMT5ForConditionalGeneration, lambda: UMT5Config(**T5_SIZES)),
    "t5gemma": (T5GemmaForConditionalGeneration, lambda: T5GemmaConfig(**GEMMA)),
}
#: Linears of a block by stack under the layouts full, light and attention, and blocks.
COUNTS = {"umt5": ((7, 3, 4), (11, 5, 8), 2, 2), "t5gemma": ((7, 3, 4), (11, 5, 8), 3, 2)}
LAYOUTS = ("full", "light", "attention")


def make(name):
    """A model whose weights are large enough that each of them tells."""
    kind, config = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config())
        for parameter in model.parameters():
            parameter.data = 0.15 * torch.randn_like(parameter)
    complete(model.config, find_family(model.config))
    return model.eval()


def make_rows():
    """Inputs with one answer or several, some longer than the window."""
    draw = np.random.default_rng(0)
    shapes = ((11, (3, 1, 9)), (7, (2,)), (13, (1, 8)))
    return [
        EncodedRow(draw.integers(5, 90, n), [draw.integers(5, 90, m) for m in a]) for n, a in shapes
    ]


def alone(model, row):
    """The model's own arguments for one input without padding."""
    ids = torch.from_numpy(row.input_ids)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("is_fused", [False, True])
def test_answers_side_by_side_are_transformers_own(name, is_fused):
    model, faster = make(name), make(name)
    if is_fused:
        find_family(model.config).fuse(faster, BackboneConfig(name="x"))
    placed = place_model(faster)
    packed = placed.pack(make_rows())
    found_BDV = placed.logits(packed)
    for number, row in enumerate(packed.rows):
        for start, answer in zip(packed.starts[number], row.answers, strict=True):
            labels = torch.from_numpy(answer)[None]
            expected = model(**alone(model, row), labels=labels).logits[0]
            found = found_BDV[number, start : start + len(answer)]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_buffers_are_those_that_transformers_loads(tmp_path):
    make("t5gemma").to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = MODELS["t5gemma"][0].from_pretrained(tmp_path, dtype=torch.bfloat16)
    config = BackboneConfig(name=str(tmp_path), dtype="bfloat16")
    model = Engine({}, timeout_seconds=60).build(config, read_blueprint(config))
    found, expected = (dict(model.named_buffers()) for model in (model, theirs))
    assert len(found) == len(expected) > 0
    for buffer_name, buffer in found.items():
        assert buffer.dtype == expected[buffer_name].dtype
        assert torch.equal(buffer, expected[buffer_name]), buffer_name


@torch.no_grad()
def test_generation_and_states_are_those_of_rows_alone(name):
    model = make(name)
    family, rows = find_family(model.config), make_rows()
    options = {"max_new_tokens": 9, "do_sample": False}
    found = family.generate(model, rows, device=torch.device("cpu"), **options)
    states_BLH, mask_BL = family.states(model, family.pack(rows, model.config))
    for number, row in enumerate(rows):
        start = {"decoder_start_token_id": family.start_id(model.config)}
        expected = model.generate(**alone(model, row), **start, **options)[0].tolist()
        assert found[number][: len(expected)] == expected
        own = model.get_encoder()(**alone(model, row)).last_hidden_state[0]
        torch.testing.assert_close(states_BLH[number][mask_BL[number].bool()], own)
    packed = family.pack(rows, model.config)
    family.run_generation(model, packed, beams=2, new_tokens=2)


def test_layouts_find_their_linears_and_are_told_from_names(name):
    model = make(name)
    encoder, decoder, n_encoder, n_decoder = COUNTS[name]
    for number, layout in enumerate(LAYOUTS):
        sites = find_sites(model, layout)
        assert len(sites) == encoder[number] * n_encoder + decoder[number] * n_decoder
        widths = {site.name: (site.in_features, site.out_features) for site in reversed(sites)}
        found, again = recognise_sites(widths)
        assert (found.linears, again) == (layout, sites)


def test_a_model_of_other_depths_has_as_many_blocks(name):
    model = make(name)
    family = find_family(model.config)
    resized = family.resize(model.config, {"encoder": 1, "decoder": 4})
    assert {stack: one.count for stack, one in family.blocks(resized).items()} == {
        "encoder": 1,
        "decoder": 4,
    }
    family.build(resized)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_stock_peft_gives_the_same_logits_and_the_folder_comes_back(name, kind, tmp_path):
    model = make(name)
    family, rows = find_family(model.config), make_rows()
    config = AdapterConfig(kind=kind, rank=2 if kind == "lora" else 1, n_skills=1, alpha=3.0)
    adapter = attach(model, config, tasks=("a",))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    packed = family.pack(rows, model.config)
    with torch.no_grad(), adapter.slots([0] * len(rows)):
        expected = family.logits(model, packed)
    write = {"lora": peft_folders.write_peft_lora, "ia3": peft_folders.write_peft_ia3}[kind]
    write(adapter, tmp_path, base_model=None)
    assert '"SEQ_2_SEQ_LM"' in (tmp_path / peft_folders.CONFIG).read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(make(name), tmp_path).eval()
    with torch.no_grad():
        found = family.logits(stock, packed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    again = peft_folders.open_adapter(tmp_path)[1]
    assert again.sites == adapter.sites
    ours, theirs = (dict(one.inventory.named_tensors()) for one in (adapter, again))
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_recipes_name_the_types():
    family, config, fields = make_config({"model_type": "umt5", **T5_SIZES})
    assert (type(config), fields["model_type"]) == (UMT5Config, "umt5")
    family, config, _ = make_config({"model_type": "t5gemma", **GEMMA})
    assert (family.name, config.vocab_size, family.start_id(config)) == ("T5Gemma", 96, 2)
    assert family is FAMILIES[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_encoder_decoder": False}, "an encoder alone is no backbone"),
        (
            {"decoder": {**stack(64, 2), "vocab_size": 90}},
            "96 in the encoder and 90 in the decoder",
        ),
        ({"encoder": {**stack(32, 3), "head_dim": 0}}, "encoder.head_dim 0 is not a whole number"),
        ({"sizes": 3}, "t5gemma has no setting 'sizes'"),
    ],
)
def test_a_t5gemma_that_none_can_be_is_refused(changes, words):
    with pytest.raises(BackboneError, match=words):
        make_config({"model_type": "t5gemma", **GEMMA, **changes})
