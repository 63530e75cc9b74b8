"""The verb `convert`: a backbone's checkpoint in, a folder of checked safetensors shards out.

<folder>/  model-0000x-of-0000y.safetensors, model.safetensors.index.json   as transformers reads
           config.json, generation settings, tokenizer                      the original's
           tokenizer.json    written of a sentencepiece file that stands alone
           mhr_scale.json    sizes, hashes, ties, source and fingerprint
"""

from pathlib import Path
from typing import Any

import torch

from mhr_scale.backbone import conversion, fingerprint, hub, merging, quantise
from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.backbone.manifest import (
    MANIFEST,
    SCHEMA,
    Fingerprint,
    Manifest,
    read_manifest,
    verify_hashes,
    write_manifest,
)
from mhr_scale.backbone.shards import Weight, check_free_space
from mhr_scale.backbone.tokenizer import load_tokenizer, write_fast
from mhr_scale.config import BackboneConfig, ConvertConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError, RunError, some
from mhr_scale.exchange import stock
from mhr_scale.run.files import as_size
from mhr_scale.run.folders import check_target, moved_into_place, nearest_folder
from mhr_scale.run.runlog import rank
from mhr_scale.run.streams import write_result


def convert(config: ConvertConfig) -> Path:
    """Write the folder that `config` asks for, or verify it, and return it.

    Only rank 0 works; other processes of a launcher return at once. A failed or interrupted
    conversion leaves nothing in the folder, and the same command starts over.
    """
    target = Path(config.folder)
    if rank():
        return target
    if config.verify:
        verify(target)
        return target
    source = hub.BUILTIN.get(config.backbone.name, Path(config.backbone.name).expanduser())
    if source.exists() and source.resolve() == target.resolve():
        raise RunError(f"folder: {target} is the backbone itself; name another folder")
    check_target(target)
    settings = BackboneConfig(
        name=config.backbone.name, revision=config.backbone.revision, dtype=config.dtype
    )
    blueprint = read_blueprint(settings)
    if blueprint.quantise != "none":
        raise BackboneError(
            f"backbone.name: {config.backbone.name} holds {blueprint.quantise} weights; convert "
            "what they were made from"
        )
    quantise.check_linears(config.quantise, blueprint, "quantise")
    weights, left_out = conversion.plan(blueprint, config.dtype)
    laid_out = conversion.lay_out(blueprint, weights, config.quantise)
    questions = make_questions(config, settings, blueprint)
    check_free_space(nearest_folder(target), list(laid_out), what="the converted backbone")
    with moved_into_place(target) as folder:
        merging.write_companions(
            folder,
            blueprint=blueprint,
            settings=settings,
            weights=weights,
            quantised=quantise.describe(blueprint, config.quantise, config.dtype),
        )
        assert blueprint.folder is not None
        write_fast(blueprint.folder, folder)
        facts = conversion.write_weights(
            folder,
            blueprint=blueprint,
            weights=laid_out,
            kind=config.quantise,
            max_shard_bytes=config.max_shard_bytes,
        )
        files = conversion.hash_companions(folder, facts)
        written = read_blueprint(BackboneConfig(name=str(folder)))
        answers, plain = ask_written(config, written, blueprint, questions)
        verdict = compare(config, settings, blueprint, plain)
        write_manifest(
            folder,
            Manifest(
                schema=SCHEMA,
                source=source_of(blueprint),
                dtype=config.dtype,
                tied=blueprint.ties,
                left_out=left_out,
                files=files,
                fingerprint=answers,
                quantise=config.quantise,
            ),
        )
        read_blueprint(BackboneConfig(name=str(folder)))
    verdicts = [verdict] if config.quantise == "none" else [verdict, distance(config, answers)]
    closing_words = closing(
        config, list(laid_out), left_out, n_files=len(files), verdict="\n  ".join(verdicts)
    )
    write_result(closing_words + "\n")
    return target


# -- what the manifest holds -----------------------------------------------------------------------


def make_questions(
    config: ConvertConfig, settings: BackboneConfig, blueprint: Blueprint
) -> Fingerprint:
    """The token rows of the fingerprint; raises `BackboneError` if prompts cannot be tokenised."""
    prompts: list[list[int]] = []
    if config.fingerprint.prompts:
        tokenizer = load_tokenizer(settings, blueprint)
        prompts = tokenizer(list(config.fingerprint.prompts))["input_ids"]
    return fingerprint.make_questions(blueprint, prompts)


def ask_written(
    config: ConvertConfig, written: Blueprint, original: Blueprint, questions: Fingerprint
) -> tuple[Fingerprint, Fingerprint]:
    """The fingerprint of what was written, and of the same weights before they were quantised."""
    if config.quantise == "none":
        answers = fingerprint.make(written, questions)
        return answers, answers
    plain = fingerprint.ask_source(original, questions, rounded=getattr(torch, config.dtype))
    engine = Engine({}, timeout_seconds=60, device=torch.device("cpu"))
    model = engine.build(BackboneConfig(name=str(written.folder)), written)
    return fingerprint.make_quantised(written, model, questions, plain), plain


def source_of(blueprint: Blueprint) -> dict[str, Any]:
    """The origin of the weights: name, commit, and the names and sizes of the files."""
    source = blueprint.source
    files = {source.file(name) for name in source.names()}
    sizes = {file.name: file.stat().st_size for file in files if file is not None}
    return {**blueprint.facts, "files": dict(sorted(sizes.items()))}


def compare(
    config: ConvertConfig,
    settings: BackboneConfig,
    blueprint: Blueprint,
    answers: Fingerprint,
) -> str:
    """Compare the logits with what transformers computes from the original; the verdict in words.

    Raises `BackboneError` if they differ.
    """
    if not config.fingerprint.compare:
        return "not compared with transformers' reading of the original (as asked)"
    try:
        model = stock.map_backbone(settings, blueprint)
        theirs = fingerprint.ask_model(
            model, blueprint.family, answers, dtype=getattr(torch, config.dtype)
        )
        difference = conversion.check_answer(theirs, answers, what="what was written")
    except BackboneError as error:
        raise BackboneError(
            f"{config.folder}: not converted: against transformers' reading of "
            f"{config.backbone.name}: {error}; fingerprint.compare: false converts all the same"
        ) from error
    return f"the logits are those of transformers' reading of the original {agreement(difference)}"


# -- checks and messages ---------------------------------------------------------------------------


def verify(target: Path) -> None:
    """Check every file of a converted folder; raises `BackboneError` if anything has changed."""
    if not target.is_dir():
        raise RunError(f"folder: no folder {target}; convert first, without verify")
    manifest = read_manifest(target)
    if manifest is None:
        raise BackboneError(f"{target / MANIFEST}: missing; only converted folders can be verified")
    blueprint = read_blueprint(BackboneConfig(name=str(target.absolute())))
    verify_hashes(target, manifest)
    try:
        difference = conversion.check_answer(
            manifest.fingerprint,
            fingerprint.ask_source(blueprint, manifest.fingerprint),
            what="these weights and the stored ones",
        )
    except BackboneError as error:
        raise BackboneError(f"{target}: {error}; convert anew") from error
    write_result(
        f"{target}: {len(manifest.files)} files as they were written, logits "
        f"{agreement(difference)}\n"
    )


def agreement(difference: float) -> str:
    """How well logits agree, in words."""
    return f"to {difference:.0e} of their spread" if difference else "exactly"


def distance(config: ConvertConfig, answers: Fingerprint) -> str:
    """How far quantised weights are from what they were made from, in words."""
    return (
        f"in {config.quantise} its logits differ from {config.dtype}'s by "
        f"{100 * answers.distance:.2g} % of their spread"
    )


def closing(
    config: ConvertConfig, weights: list[Weight], left_out: list[str], *, n_files: int, verdict: str
) -> str:
    """The closing message: what was written, how well it agrees, and how to use it."""
    size = as_size(sum(weight.n_bytes for weight in weights))
    kind = "" if config.quantise == "none" else f"{config.quantise} and "
    lines = [
        f"{config.backbone.name} -> {config.folder}: {len(weights)} tensors, {size} in "
        f"{kind}{config.dtype}, {n_files} files",
        verdict,
        f"use: backbone.name={config.folder}",
    ]
    if left_out:
        lines.insert(1, f"left out, of no use to the model: {some(left_out)}")
    return "\n  ".join(lines)
