"""A config's adapter put into a model or a stage of one, and what its parameters begin with.

Above the other files of the room; train calls it between a model's making and its wrapping, at the same place under
every layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardwright.adapt.freeze import apply_freeze, choose_trained
from shardwright.adapt.lora import LEAVES, apply_lora, check_targets
from shardwright.config import AdaptConfig
from shardwright.model.families import build_model
from shardwright.model.init import build_generator, initial_value
from shardwright.model.transformer import LanguageModel, TransformerConfig


def apply_adapter(model: LanguageModel, config: AdaptConfig, trained: set[str] | None = None) -> None:
    """Put the adapter into a model, or into a part of one, and freeze what is not trained, in place.

    trained: as `trained_names` of the whole model; None leaves all as they are, for a model that is only called.
    """
    if config.method == "lora":
        apply_lora(model, config)
    if trained is not None and config.freezes:
        apply_freeze(model, trained)


def _whole(model: TransformerConfig, config: AdaptConfig) -> LanguageModel:
    """The adapted model on the meta device."""
    with torch.device("meta"):
        whole = build_model(model)
        if config.method == "lora":
            check_targets(whole, model.family, config.targets)
        apply_adapter(whole, config)
    return whole


def adapter_names(model: TransformerConfig, config: AdaptConfig) -> set[str]:
    """Names of the parameters that the adapter adds; ConfigError where it does not go with the model."""
    if config.method == "none":
        return set()
    with torch.device("meta"):
        own = {name for name, _ in build_model(model).named_parameters()}
    return {name for name, _ in _whole(model, config).named_parameters()} - own


def trained_names(model: TransformerConfig, config: AdaptConfig) -> set[str]:
    """Names of the parameters that are trained; ConfigError where a pattern names nothing, or nothing is left."""
    names = [name for name, _ in _whole(model, config).named_parameters()]
    added = adapter_names(model, config)
    own = [name for name in names if name not in added]
    return choose_trained(own, config.freeze if config.method == "none" else ["*"], config.train, added)


def num_adapter(model: TransformerConfig, config: AdaptConfig) -> dict[str, int]:
    """Parameters by what becomes of them: `trained`, of which `added` are the adapter's, and `frozen`."""
    sizes = {name: p.numel() for name, p in _whole(model, config).named_parameters()}
    trained, added = trained_names(model, config), adapter_names(model, config)
    return {
        "trained": sum(sizes[name] for name in trained),
        "added": sum(sizes[name] for name in added),
        "frozen": sum(size for name, size in sizes.items() if name not in trained),
    }


def first_value(model: TransformerConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """As `model.init.initial_value`, of an adapter's parameters too."""
    leaf = name.rpartition(".")[2]
    if leaf not in LEAVES:
        return initial_value(model, name, shape, seed)
    if leaf == "lora_b":
        return torch.zeros(shape)
    edge = 1 / math.sqrt(shape[1])  # He et al. 2015 with a slope of sqrt(5), as peft begins
    return torch.empty(shape).uniform_(-edge, edge, generator=build_generator(seed, name))
