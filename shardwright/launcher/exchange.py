"""The commands that take models in and give them out: thin faces, as those of cli.py, which knows them by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from shardwright.config import ConfigError
from shardwright.launcher.arguments import Json, Overrides
from shardwright.log import get_logger, quantity

Format = Annotated[str | None, typer.Option("--dtype", help="fp32, bf16 or fp16; default as they are")]


def import_(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, or a name on the hub; with --deepspeed a config")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder of the imported model")] = None,
    dtype: Format = None,
    deepspeed: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What save_checkpoint wrote: pickles, so only if you trust it")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="With --deepspeed, as global_step100; default the latest")] = None,
    as_json: Json = False,
) -> None:
    """Take in a Hugging Face model, to begin runs from; or begin a run with the weights of a DeepSpeed program."""
    if deepspeed is not None:
        return _import_deepspeed(source, overrides or (), deepspeed, tag)
    if output is None or overrides or tag is not None:
        wrong = "a folder is to be named" if output is None else "settings and --tag go with --deepspeed"
        raise ConfigError(f"import {source}: {wrong}; expected shardwright import SOURCE --output FOLDER")
    from shardwright.train.imports import import_model

    if as_json:
        get_logger().setLevel(logging.WARNING)
    made = import_model(source, output, dtype)
    text = f"{output}: {made.tensors} tensors, {quantity(made.bytes, ' ')}B, {made.tokenizer or 'no tokenizer'}"
    print(json.dumps(made.as_dict()) if as_json else f"{text}; begin a run with begin={output}")


def _import_deepspeed(config: str, overrides: Sequence[str], folder: Path, tag: str | None) -> None:
    from shardwright.interop.deepspeed import read_weights
    from shardwright.train.begin import begin
    from shardwright.train.settings import read_config

    weights = read_weights(folder, tag)
    place = begin(read_config(config, overrides), weights)
    print(f"{place}: {len(weights)} tensors of {folder}; shardwright train goes on from there")


def export(
    run_folder: Annotated[Path, typer.Argument(help="Run folder, checkpoint or imported model")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New Hugging Face folder")],
    dtype: Format = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of one file: 5GB, 500MB")] = "5GB",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Open it again and compare logits")] = True,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4: weights of linear layers, by torchao")] = None,
    group: Annotated[int | None, typer.Option(min=1, help="With --quantize: inputs that share a scale")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put a run's adapter into the matrices beneath it")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as a Hugging Face folder, and prove that it is the same model."""
    from shardwright.train.exports import export_model

    if as_json:
        get_logger().setLevel(logging.WARNING)
    if quantize is not None and merge:
        raise ConfigError("--merge: does not go with --quantize; merge first, import that, and quantise what it gives")
    if quantize is not None:
        return _export_quantized(run_folder, output, quantize, group, dtype, max_shard_size, check, as_json)
    if group is not None:
        raise ConfigError("--group: goes with --quantize")
    made = export_model(run_folder, output, dtype=dtype, shard=max_shard_size, check=check, merge=merge)
    count = f"{made.files} file{'s' * (made.files > 1)}"
    text = f"{output}: {made.tensors} tensors, {quantity(made.bytes, ' ')}B in {count}"
    print(json.dumps(made.as_dict()) if as_json else f"{text}; {made.verdict.text if made.verdict else 'not checked'}")


def prune(
    run_folder: Annotated[Path, typer.Argument(help="Run folder, checkpoint or imported model")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder of the pruned model")],
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros in each matrix, the smallest weights")] = None,
    pattern: Annotated[str | None, typer.Option(help="2:4, two zeros in every four neighbours of a row")] = None,
    include: Annotated[str | None, typer.Option(help="Only weights of such names, as *.mlp.*")] = None,
    as_json: Json = False,
) -> None:
    """Set weights of linear layers to zero; begin a run from it with train.keep_zeros=true, or export it."""
    from shardwright.train.pruned import prune_model

    if as_json:
        get_logger().setLevel(logging.WARNING)
    made = prune_model(run_folder, output, sparsity=sparsity, pattern=pattern, include=include)
    text = f"{output}: {made.zeros / made.values:.1%} of {made.values:,} weights in {made.tensors} tensors are zero"
    print(json.dumps(made.as_dict()) if as_json else f"{text}; train on with begin={output} train.keep_zeros=true")


def _export_quantized(
    run_folder: Path,
    output: Path,
    quantize: str,
    group: int | None,
    dtype: str | None,
    shard: str,
    check: bool,
    as_json: bool,
) -> None:
    from shardwright.train.quantized import export_quantized

    made = export_quantized(run_folder, output, quantize, group=group, dtype=dtype, shard=shard, check=check)
    sizes = f"{quantity(made.bytes_before, ' ')}B become {quantity(made.bytes, ' ')}B"
    text = (
        f"{output}: {made.quantized} of {made.tensors} tensors in {quantize}, {sizes}; on random tokens logits move by "
        f"{made.difference:.2g} of the largest, KL {made.divergence:.2g} nats a token"
    )
    print(json.dumps(made.as_dict()) if as_json else f"{text}; {made.verdict.text if made.verdict else 'not checked'}")
