"""Weights out of a checkpoint that a program of the user's own made with DeepSpeed.

Those files are pickles: reading one can run whatever its writer put there. So nothing but `shardwright import
--deepspeed`, which a user calls by name, comes here; a run reads and writes checkpoints of its own format alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from shardwright.config import ConfigError
from shardwright.interop.huggingface import import_tensors
from shardwright.model.families import build_model
from shardwright.model.transformer import TransformerConfig

PREFIXES = ("module.", "_orig_mod.", "model.")  # of wrappers around what is ours


def read_weights(folder: Path, tag: str | None = None) -> dict[str, Tensor]:
    """Float32 weights of a DeepSpeed folder at any ZeRO stage, by the names of the model that was trained.

    `tag` is a folder below it such as global_step100; by default what its `latest` names. ConfigError where there is
    none, or where one model is cut over several tensor-parallel files.
    """
    tag = tag or _latest(folder)
    place = folder / tag
    states = sorted(place.glob("*model_states.pt"))
    if not states:
        raise ConfigError(f"{place}: no *model_states.pt in it; name the folder that save_checkpoint was given")
    pieces = {path.name.partition("_model_states")[0] for path in states if path.name.startswith("mp_rank_")}
    if len(pieces) > 1:
        raise ConfigError(f"{place}: {len(pieces)} tensor-parallel parts; merge them with DeepSpeed's own tools first")
    if not list(place.glob("*_optim_states.pt")):  # ZeRO 0 keeps the model whole
        module = torch.load(states[0], map_location="cpu", weights_only=False)["module"]
        return {name: tensor.float() for name, tensor in module.items() if tensor.is_floating_point()}
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("import --deepspeed: DeepSpeed is not installed; pip install 'shardwright[deepspeed]'")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(sys.stderr):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag))


def our_names(config: TransformerConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by our logical names, from ours behind a wrapper's prefix or from Hugging Face's.

    ConfigError naming what is missing or of another shape.
    """
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in build_model(config).named_parameters()}
    found = dict(theirs)
    while found.keys() < shapes.keys() or not shapes.keys() <= found.keys():
        prefix = next((p for p in PREFIXES if found and all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if not shapes.keys() <= found.keys():
        try:
            found = dict(import_tensors(config, _without_wrapper(theirs)))
        except ValueError as error:
            raise ConfigError(f"import: {error}") from None
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ConfigError(f"{name}: has shape {tuple(found[name].shape)}, the config says {tuple(shape)}")
    return {name: found[name] for name in shapes}


def _without_wrapper(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(theirs)
    while found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found


def _latest(folder: Path) -> str:
    try:
        return (folder / "latest").read_text("utf-8").strip()
    except OSError:
        raise ConfigError(
            f"{folder / 'latest'}: no such file; name the folder that save_checkpoint was given, or add --tag"
        ) from None
