"""The frozen backbone: where its weights come from, which of them are one tensor, its tokenizer.

Nothing here knows about ranks or shards: `engine.py` asks a `WeightSource` for the range of each
tensor that it needs. The loader is our own because transformers ties an untied `lm_head` to the
embeddings without a word when it loads under ZeRO-3 (T0, T5 v1.1, FLAN): ties are decided here,
from the names in the checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError, first_line
from mhr_scale.hub import TOKENIZER_FILES, find_folder
from mhr_scale.manifest import Manifest, check_files, check_weights, read_manifest
from mhr_scale.t5_config import make_config, read_config
from mhr_scale.weights import PickledSource, RandomSource, WeightSource, open_weights

#: Names that are the embedding by definition of the architecture.
EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
#: A text whose characters hardly any vocabulary holds.
UNSEEN = "\u16a0\ue000\U0001f9a4"
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """Everything needed to build one backbone: configuration, weights and where they are from."""

    model_class: Any
    model_config: Any
    source: WeightSource
    is_lm_head_tied: bool
    folder: Path | None
    facts: dict[str, Any]
    manifest: Manifest | None = None


def read_blueprint(config: BackboneConfig) -> Blueprint:
    """Find the backbone; raises `BackboneError` if it cannot be found, read or trusted."""
    if config.name is None:
        return _random_blueprint(config)
    folder = find_folder(config.name, config.revision)
    model_config, raw = read_config(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest)
    source = open_weights(folder)
    if manifest is None:
        tied = _is_tied(source, says_tied=raw.get("tie_word_embeddings", True) is not False)
    else:
        check_weights(folder, manifest, source)
        tied = HEAD in manifest.tied
    facts: dict[str, Any] = {
        "name": config.name,
        "revision": config.revision,
        "folder": folder.name,
    }
    if manifest is not None:
        facts["converted_from"] = manifest.source
    return Blueprint(
        model_class=_model_class(raw["model_type"]),
        model_config=model_config,
        source=source,
        is_lm_head_tied=tied,
        folder=folder,
        facts=facts,
        manifest=manifest,
    )


def _random_blueprint(config: BackboneConfig) -> Blueprint:
    """A backbone of the recipe's own configuration, with random weights."""
    assert config.config is not None
    fields = {"decoder_start_token_id": 0, **config.config}
    model_config = make_config(fields)
    tied = fields.get("tie_word_embeddings", True) is not False
    shapes = _shapes(model_config, tied=tied)
    return Blueprint(
        model_class=_model_class("t5"),
        model_config=model_config,
        source=RandomSource(model_config, shapes, config.config_seed),
        is_lm_head_tied=tied,
        folder=None,
        facts={"name": None, "config": dict(fields), "config_seed": config.config_seed},
    )


def make_model(blueprint: Blueprint) -> nn.Module:
    """Build the model without filling its weights, on whatever device the context says.

    Ties are made as the checkpoint has them; the model is frozen and in evaluation mode.
    """
    from transformers import initialization as hf_init

    with hf_init.no_init_weights(), hf_init.no_tie_weights():
        model: nn.Module = blueprint.model_class(blueprint.model_config)
    tie(model, blueprint)
    model.requires_grad_(False)
    return model.eval()


def tie(model: Any, blueprint: Blueprint) -> None:
    """Make the tied parameters one, and leave an untied `lm_head` alone."""
    model.encoder.embed_tokens.weight = model.shared.weight
    model.decoder.embed_tokens.weight = model.shared.weight
    if blueprint.is_lm_head_tied:
        model.lm_head.weight = model.shared.weight
    model.config.tie_word_embeddings = blueprint.is_lm_head_tied


def plan_copies(model: nn.Module, source: WeightSource) -> dict[str, nn.Parameter]:
    """Map each name to be read to the parameter it fills, every parameter exactly once.

    Raises `BackboneError` listing missing, unknown or mis-shaped tensors. A ZeRO-3 parameter's
    whole shape is its `ds_shape`.
    """
    parameters = dict(model.named_parameters())
    known = set(EMBEDDING_ALIASES) | {EMBEDDING, HEAD}
    names = source.names()
    faults = [f"missing {name}" for name in sorted(parameters.keys() - names)]
    faults += [
        f"unknown {name}"
        for name in sorted(names - parameters.keys() - known)
        if not ("EncDecAttention" in name and name.endswith(".relative_attention_bias.weight"))
    ]
    for name in sorted(parameters.keys() & names):
        parameter = parameters[name]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != source.shape(name):
            faults.append(f"{name} is {list(source.shape(name))}, the model wants {list(shape)}")
    if faults:
        files = [file for file in map(source.file, sorted(names)) if file is not None]
        place = f"{files[0].parent}: " if files else ""
        raise BackboneError(
            f"{place}the checkpoint does not fit its configuration, {len(faults)} fault(s): "
            f"{'; '.join(faults[:5])}; fetch both again"
        )
    return parameters


def set_dropout(model: nn.Module, rate: float | None) -> None:
    """Set every dropout of the backbone; None keeps the configuration's rate."""
    if rate is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(getattr(module, "dropout", None), float):
            setattr(module, "dropout", rate)  # noqa: B010 (T5Attention applies it itself)


def fuse(model: nn.Module, config: BackboneConfig) -> None:
    """Put the fused parts of T5 in place that `config` switches on."""
    from mhr_scale import fused_t5

    fused_t5.install(model, config)


def set_recompute(model: Any, mode: str) -> None:
    """Switch activation checkpointing on (`reentrant`, `non_reentrant`) or leave it off."""
    if mode == "none":
        return
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": mode == "reentrant"}
    )
    model.enable_input_require_grads()
    model.config.use_cache = False


def evaluate(model: nn.Module) -> None:
    """Put the model into evaluation mode; blocks that recompute activations go on doing so.

    Their own flag decides that and nothing else: dropout and routing noise lie in modules below.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True


def require_input_gradients(model: Any) -> None:
    """Let gradients flow to the embeddings, so that a backward pass meets every module."""

    def flow(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == model.config.d_model:
            module.register_forward_hook(flow)


class _Joint(torch.autograd.Function):
    """Identity; the gradients of everything behind it are summed before they go on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def order_gradients(model: nn.Module) -> None:
    """Sum gradients at the inputs of blocks, norms and siblings, as ZeRO-3's hooks do.

    Addition of floats has an order. With this one a replicated backbone gives the very bits that a
    sharded one gives, and runs of both placements can be compared exactly.
    """

    def join(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            _Joint.apply(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs
        )

    for module in model.modules():
        if type(module).__name__.endswith(("LayerNorm", "Block", "Siblings")):
            module.register_forward_pre_hook(join)


def load_tokenizer(config: BackboneConfig, blueprint: Blueprint) -> Any:
    """The backbone's tokenizer, or `byt5`, which needs no files; no larger than the embeddings.

    Raises `BackboneError` if it cannot be read. Without its files transformers would give a
    tokenizer that knows no words, and no error.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    name = config.tokenizer or ("byt5" if blueprint.folder is None else None)
    if name == "byt5":
        tokenizer = ByT5Tokenizer()
    else:
        folder = blueprint.folder
        if name is not None:
            folder = find_folder(name, None, setting="backbone.tokenizer", files=TOKENIZER_FILES)
        assert folder is not None
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise BackboneError(
                f"{folder}: no readable tokenizer ({first_line(error)}); set backbone.tokenizer"
            ) from error
        wanted = sorted(set(tokenizer.vocab_files_names.values()))
        if wanted and not any((folder / file).is_file() for file in wanted):
            raise BackboneError(
                f"{folder}: no tokenizer here ({' or '.join(wanted)}); set backbone.tokenizer"
            )
    is_own = name is None
    place = f"{blueprint.folder}: its tokenizer" if is_own else "backbone.tokenizer:"
    way_out = "set backbone.tokenizer" if is_own else "choose the backbone's own tokenizer"
    _check_tokenizer(tokenizer, blueprint.model_config.vocab_size, place=place, way_out=way_out)
    return tokenizer


def _check_tokenizer(tokenizer: Any, vocab_size: int, *, place: str, way_out: str) -> None:
    """Raise `BackboneError` if texts cannot be told apart from padding, or do not fit."""
    for token in ("pad_token", "eos_token"):
        if getattr(tokenizer, token) is None:
            raise BackboneError(f"{place} has no {token}; {way_out}")
    n_pieces = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if n_pieces > vocab_size:
        verb = " has" if place.endswith("tokenizer") else ""
        raise BackboneError(
            f"{place}{verb} {n_pieces} pieces, the backbone embeds only {vocab_size}; {way_out}"
        )
    try:
        tokenizer(["a text", UNSEEN], add_special_tokens=False)
    except Exception as error:
        raise BackboneError(
            f"{place} cannot read every text ({first_line(error)}); {way_out}"
        ) from error


def mean_states(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The states of an encoder averaged over the tokens of each text: (B, H)."""
    states_BLH = encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state.float()
    mask_BL1 = inputs["attention_mask"].unsqueeze(-1)
    mean_BH: Tensor = (states_BLH * mask_BL1).sum(1) / mask_BL1.sum(1)
    return mean_BH


def load_sentence_encoder(name: str, device: torch.device) -> Callable[[list[str]], Tensor]:
    """A function from texts to vectors (texts, H): the mean states of a hub id or a folder.

    Raises `BackboneError` if it cannot be read.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(name).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise BackboneError(
            f"soup.encoder: {name}: not a readable encoder ({first_line(error)}); give a "
            "folder or a hub id"
        ) from error
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), 32):
            part = texts[start : start + 32]
            inputs = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            found.append(mean_states(encoder, inputs.to(device)).cpu())
        return torch.cat(found)

    return encode


def _model_class(model_type: str) -> Any:
    """The model class of a type, imported here: not where parameters are being sharded."""
    from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

    return {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration}[model_type]


def _shapes(model_config: Any, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, built on the meta device."""
    blueprint = Blueprint(
        model_class=_model_class("t5"),
        model_config=model_config,
        source=PickledSource([]),
        is_lm_head_tied=tied,
        folder=None,
        facts={},
    )
    with torch.device("meta"):
        model = make_model(blueprint)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def tied_names(blueprint: Blueprint) -> dict[str, str]:
    """Names that a checkpoint may give the embedding besides its own."""
    aliases = (*EMBEDDING_ALIASES, *((HEAD,) if blueprint.is_lm_head_tied else ()))
    return dict.fromkeys(aliases, EMBEDDING)


def _is_tied(source: WeightSource, *, says_tied: bool) -> bool:
    """Whether `lm_head` is the embedding: absent, or said to be and equal to it."""
    if HEAD not in source.names():
        return True
    return says_tied and EMBEDDING in source.names() and is_equal(source, HEAD, EMBEDDING)


def is_equal(source: WeightSource, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are the same, bit for bit; a part is read at a time."""
    shape = source.shape(name)
    if shape != source.shape(other) or len(shape) != 2:
        return False
    step = max(1, shape[1]) * 1024
    total = shape[0] * shape[1]
    return all(
        torch.equal(
            source.read(name, start, min(start + step, total)),
            source.read(other, start, min(start + step, total)),
        )
        for start in range(0, total, step)
    )
