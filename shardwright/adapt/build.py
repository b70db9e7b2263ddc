"""A config's adapter put into a model or a stage of one, and what its parameters begin with.

Above the other files of the room; train calls it between a model's making and its wrapping, at the same place under
every layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwright.adapt.freeze import apply_freeze, choose_trained
from shardwright.adapt.lora import LEAVES, apply_lora, check_targets
from shardwright.adapt.prefix import apply_prefix
from shardwright.adapt.prompt import apply_prompt
from shardwright.config import AdaptConfig, ConfigError
from shardwright.model.attention import Core
from shardwright.model.families import build_model
from shardwright.model.init import build_generator, initial_value
from shardwright.model.transformer import LanguageModel, TransformerConfig

APPLY: dict[str, Callable[[Any, AdaptConfig], None]] = {
    "lora": apply_lora,
    "prompt": apply_prompt,
    "p_tuning": apply_prompt,
    "prefix": apply_prefix,
}
#: Parts of names of linear layers that virtual tokens come out of.
NETWORKS = ("embed.tokens.encoder.", ".core.project.", "prefix.first.")


def apply_adapter(model: LanguageModel, config: AdaptConfig, trained: set[str] | None = None) -> None:
    """Put the adapter into a model, or into a part of one, and freeze what is not trained, in place.

    trained: as `trained_names` of the whole model; None leaves all as they are, for a model that is only called.
    """
    if config.method != "none":
        APPLY[config.method](model, config)
    if trained is not None and config.freezes:
        apply_freeze(model, trained)


def _whole(model: TransformerConfig, config: AdaptConfig) -> LanguageModel:
    """The adapted model on the meta device."""
    with torch.device("meta"):
        whole = build_model(model)
        _check(whole, model, config)
        apply_adapter(whole, config)
    return whole


def _check(whole: LanguageModel, model: TransformerConfig, config: AdaptConfig) -> None:
    """ConfigError where the adapter does not go with such a model."""
    if config.method == "lora":
        check_targets(whole, model.family, config.targets)
    elif config.method != "none" and model.family == "xlnet":
        raise ConfigError(
            f"adapt.method={config.method}: XLNet predicts tokens in an order of their own, in which virtual ones have "
            "no place; use adapt.method=lora"
        )
    if config.method == "prefix" and model.family == "modernbert":
        raise ConfigError(
            "adapt.method=prefix: transformers' ModernBERT takes no keys from outside, so peft could not open it; use "
            "adapt.method=prompt or lora"
        )
    if config.method == "prefix":
        blocks: list[Any] = [whole.blocks[str(number)] for number in model.runs[-1]]
        if model.repeats > 1 or any(type(block.attention.core) is not Core for block in blocks):
            why = "all blocks are one" if model.repeats > 1 else "its scores know the distance of every key"
            raise ConfigError(
                f"adapt.method=prefix: keys of a prefix are each block's own, and of {model.family} {why}; use "
                "adapt.method=prompt or lora"
            )


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


def adapted_shapes(model: TransformerConfig, config: AdaptConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the adapted model."""
    return {name: tuple(p.shape) for name, p in _whole(model, config).named_parameters()}


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
    inner = leaf == "weight" and any(part in name for part in NETWORKS)
    if leaf not in LEAVES and not inner:
        return initial_value(model, name, shape, seed)
    if leaf == "lora_b":
        return torch.zeros(shape)
    edge = 1 / math.sqrt(shape[1])  # He et al. 2015 with a slope of sqrt(5), as peft begins
    return torch.empty(shape).uniform_(-edge, edge, generator=build_generator(seed, name))


def virtual_vectors(model: Any, config: AdaptConfig) -> Tensor:
    """What the virtual tokens of an adapted model are: vectors [n, D], or keys and values in blocks [n, L 2 K d]."""
    if config.method != "prefix":
        vectors: Tensor = model.embed.tokens.vectors()
        return vectors
    cores = [model.blocks[str(number)].attention.core for number in model.config.runs[-1]]
    if config.projection is not None:
        cores[0].shared.table = model.prefix()
    return torch.cat([core.rows() for core in cores], dim=1)


def virtual_parts(model: TransformerConfig, config: AdaptConfig, vectors: Tensor) -> dict[str, Tensor]:
    """The way back, to parameters by name, where nothing stands between."""
    if config.method != "prefix":
        return {"embed.tokens.prompt": vectors}
    parts = vectors.chunk(len(model.runs[-1]), dim=1)
    return {f"blocks.{n}.attention.core.prefix": part for n, part in zip(model.runs[-1], parts, strict=True)}
