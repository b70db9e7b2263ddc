"""A run's adapter on its way to peft's files and back: what `shardwright export` and `adapt.begin` call for it.

Stands on adapt, which computes with adapters, and on interop, which knows peft's files; exports.py and run.py call it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.adapt import adapter_names, apply_adapter, trained_names, virtual_parts, virtual_vectors
from shardwright.adapt.lora import LEAVES, merged
from shardwright.checkpoint import StoredTensors, read_manifest
from shardwright.config import AdaptConfig, Config, ConfigError
from shardwright.interop import peft
from shardwright.interop.check import Verdict
from shardwright.interop.check_adapter import check_adapter
from shardwright.interop.huggingface import Exported
from shardwright.model.families import build_model
from shardwright.model.transformer import LanguageModel, TransformerConfig
from shardwright.parallel.logical import Logical
from shardwright.train.imports import IMPORTED
from shardwright.train.load import locate
from shardwright.train.step import Step


class Beneath(Mapping[str, Tensor]):
    """The model's own tensors out of a checkpoint, as they lie beneath an adapter, zeros in the place of some.

    `meta`: as of `StoredTensors`.
    """

    def __init__(self, stored: StoredTensors, config: Config, zero: Collection[str] = ()) -> None:
        self._stored, self._adapt, self._zero = stored, config.adapt, zero
        added = adapter_names(config.model, config.adapt)  # type: ignore[arg-type]
        self.meta = {name: tensor for name, tensor in stored.meta.items() if name not in added}

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros_like(self._stored[name]) if name in self._zero else self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


class Merged(Beneath):
    """The same, each with what LoRA adds to it."""

    def __getitem__(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        weight = self._stored[name]
        if leaf != "weight" or f"{layer}.{LEAVES[0]}" not in self._stored.meta:
            return weight
        a, b = (self._stored[f"{layer}.{part}"] for part in LEAVES)
        return merged(weight, a, b, self._adapt.scale)


def merge(stored: StoredTensors, config: Config) -> Merged:
    """The base model with its adapter in it; ConfigError where it cannot be a part of matrices."""
    if config.adapt.method not in ("none", "lora"):
        raise ConfigError(
            f"--merge: adapt.method={config.adapt.method} adds virtual tokens, which no matrix holds; export without it"
        )
    return Merged(stored, config)


def adapter_files(config: Config, stored: StoredTensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, tensors) of a run's adapter; ConfigError where its files cannot hold what was trained."""
    model: TransformerConfig = config.model  # type: ignore[assignment]
    beside = trained_beside(config)
    if config.adapt.method == "lora":
        own = {name: stored[name] for name in beside}
        return peft.lora_files(model, config.adapt, _pairs(stored), _base(config), own)
    if beside:
        raise ConfigError(
            f"export: {sorted(beside)[0]} was trained beside virtual tokens, whose files lack it; train it by "
            "adapt.method=lora"
        )
    return peft.virtual_files(model, config.adapt, _vectors(config, stored), _base(config))


def trained_beside(config: Config) -> set[str]:
    """The model's own parameters that are trained beside the adapter's."""
    model: TransformerConfig = config.model  # type: ignore[assignment]
    return trained_names(model, config.adapt) - adapter_names(model, config.adapt)


@torch.no_grad()
def _vectors(config: Config, stored: StoredTensors) -> Tensor:
    """What peft calls prompt_embeddings, of an adapter in a checkpoint."""
    with torch.device("meta"):
        model = build_model(config.model)  # type: ignore[arg-type]
        apply_adapter(model, config.adapt)
    added = adapter_names(config.model, config.adapt)  # type: ignore[arg-type]
    for name in added:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(stored[name]))
    return virtual_vectors(model, config.adapt)


def _pairs(stored: StoredTensors) -> dict[str, tuple[Tensor, Tensor]]:
    first, second = LEAVES
    layers = [name.removesuffix(f".{first}") for name in stored if name.endswith(f".{first}")]
    return {layer: (stored[f"{layer}.{first}"], stored[f"{layer}.{second}"]) for layer in layers}


def _base(config: Config) -> str | None:
    """What peft is told of the model beneath: the name that it was imported by, where that is known."""
    if config.begin is None or not Path(config.begin).is_dir():
        return None
    return read_manifest(locate(config.begin)[1]).state.get(IMPORTED, {}).get("from")


def check_adapter_files(
    folder: Path,
    config: Config,
    stored: StoredTensors,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> Verdict:
    """Whether what was written, `tensors` in `dtype`, makes of transformers' model what ours is; where that cannot be
    tried, whether it reads back to the bit. `raw`: config.json of the model beneath."""
    model: TransformerConfig = config.model  # type: ignore[assignment]
    base = Exported(model, beneath := Beneath(stored, config, trained_beside(config)), beneath.meta)
    adapt, added = _as_written(config, tensors, dtype)
    exact = beneath.keys() - trained_beside(config)

    def value(name: str) -> Tensor:
        tensor = added[name] if name in added else stored[name]
        return tensor if name in exact or dtype is None else tensor.to(dtype)

    build = partial(_adapted, adapt=adapt, value=value)
    verdict = check_adapter(folder, raw, base, model, adapt, build)
    return _read_back(folder, tensors) if verdict is None else verdict


def _as_written(
    config: Config, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[AdaptConfig, dict[str, Tensor]]:
    """The adapter to compare with, and those of its parameters that are not a checkpoint's: where files hold rounded
    values of what a network gave, no network gives them."""
    adapt = config.adapt
    if dtype is None or (adapt.method != "p_tuning" and adapt.projection is None):
        return adapt, {}
    plain = {"method": "prompt" if adapt.method == "p_tuning" else adapt.method, "projection": None}
    adapt = adapt.model_copy(update=plain)
    return adapt, virtual_parts(config.model, adapt, tensors["prompt_embeddings"])  # type: ignore[arg-type]


@torch.no_grad()
def _adapted(model: TransformerConfig, adapt: AdaptConfig, value: Callable[[str], Tensor]) -> LanguageModel:
    """Our model with its adapter, in float32."""
    whole = build_model(model)
    apply_adapter(whole, adapt)
    for name, parameter in whole.named_parameters():
        parameter.copy_(value(name))
    return whole


def _read_back(folder: Path, tensors: Mapping[str, Tensor]) -> Verdict:
    """Whether what was written reads back to the bit."""
    _, found = peft.read_adapter(folder, list(peft.KINDS.values()))
    same = found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name].cpu()) for name in found)
    return Verdict(same, f"all {len(found)} tensors read back" if same else "its files do not read back")


@torch.no_grad()
def take_adapter(step: Step, config: Config) -> None:
    """Set a step's adapter, under any layout, to that of the folder which `adapt.begin` names."""
    assert config.adapt.begin is not None
    weights = step.masters.weights
    model: TransformerConfig = config.model  # type: ignore[assignment]
    if config.adapt.method != "lora":
        vectors = peft.virtual_vectors(model, config.adapt, Path(config.adapt.begin))
        for name, value in virtual_parts(model, config.adapt, vectors).items():
            logical = Logical.of(weights[name])
            logical.local.copy_(logical.part(value))
        return step.masters.restore(weights)
    layers = [name.removesuffix(f".{LEAVES[0]}") for name in weights if name.endswith(f".{LEAVES[0]}")]
    for name, value in _saved(config).items():
        logical = Logical.of(weights[name])
        logical.local.copy_(logical.part(value))
    pairs = peft.lora_pairs(model, config.adapt, Path(config.adapt.begin), layers)
    for layer, (a, b) in pairs.items():
        rank = a.shape[0]
        for leaf, value, dim in ((LEAVES[0], a, 0), (LEAVES[1], b, 1)):
            weight = weights[f"{layer}.{leaf}"]
            logical = Logical.of(weight)
            whole = logical.gather(logical.local).clone()  # columns that theirs lacks stay at zero in b
            whole.narrow(dim, 0, rank).copy_(value)
            logical.local.copy_(logical.part(whole))
    step.masters.restore(weights)


def _saved(config: Config) -> dict[str, Tensor]:
    """What the folder that `adapt.begin` names holds of the model itself; ConfigError where that is not trained."""
    found = peft.saved_tensors(config.model, Path(config.adapt.begin or ""))  # type: ignore[arg-type]
    if frozen := sorted(found.keys() - trained_beside(config)):
        raise ConfigError(f"adapt.begin={config.adapt.begin}: holds {frozen[0]} beside LoRA; put it into adapt.train")
    return found
