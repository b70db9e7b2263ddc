"""Hugging Face's config and tensors to ours and back, from the maps that families carry as data.

Stands on model/families.py. Either side's tensors are a view of the other's, made one at a time, so that what reads
lazily is never held whole. Every tensor is accounted for: what is missing, unexpected or of another shape is an error
that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shardwright.config import parse
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.family import Family, HuggingFaceMap, TensorRule
from shardwright.model.transformer import TransformerConfig

_ABSENT = object()


def read_config(raw: Mapping[str, Any]) -> TransformerConfig:
    """Our config from the content of a config.json, theirs where it is silent; ValueError where ours cannot say it."""
    name, family = _find_family(raw.get("model_type"))
    table = _map_of(family)
    if raw.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is not supported here; take the weights before quantisation")
    raw = {**table.defaults, **raw}
    for key, expected in table.theirs.items():
        found = _get(raw, key)
        if found is not _ABSENT and found != expected:
            raise ValueError(f"config.json: {key}={found!r} is not supported here; expected {expected!r}")
    fields: dict[str, Any] = {"family": name}
    for field, keys in table.fields.items():
        found = next((v for v in (_get(raw, k) for k in keys) if v is not _ABSENT), _ABSENT)
        if found is not _ABSENT:
            fields[field] = found
    for field, (key, values) in table.values.items():
        found = _get(raw, key)
        matches = [ours for ours, theirs in values.items() if theirs == found]
        if found is not _ABSENT and not matches:
            raise ValueError(f"config.json: {key}={found!r}: expected one of {', '.join(map(repr, values.values()))}")
        fields.update({field: matches[0]} if matches else {})
    return parse(family.config, fields, "config.json")


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The content of a config.json; ValueError where theirs cannot say what ours does."""
    table = _map_of(FAMILIES[config.family])
    given = config.model_dump() | _reduced(config)
    for field, expected in table.ours.items():
        if given[field] != expected:
            raise ValueError(
                f"model.{field}={given[field]!r}: {table.architecture} has {expected!r} and cannot say otherwise"
            )
    filled = config.model_dump() | _filled(config)
    raw: dict[str, Any] = {"model_type": table.model_type, "architectures": [table.architecture]}
    for field, keys in table.fields.items():
        for key in keys:
            _put(raw, key, filled[field], field)
    for field, (key, values) in table.values.items():
        if filled[field] not in values:
            raise ValueError(f"model.{field}={filled[field]!r}: {table.architecture} has {', '.join(values)} alone")
        _put(raw, key, values[filled[field]], field)
    for key, value in table.theirs.items():
        if value is not None:
            _put(raw, key, value, key)
    return raw


class Imported(Mapping[str, Tensor]):
    """Our tensors as a view of theirs: each is made when it is asked for, so that a source that reads lazily is never
    held whole.

    `meta` holds theirs on the meta device where `theirs` reads; ours are in the attribute of that name. `dtype` None
    leaves each its own. ValueError where names or shapes do not fit the config.
    """

    def __init__(
        self,
        config: TransformerConfig,
        theirs: Mapping[str, Tensor],
        meta: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        table, self._shapes = _map_of(FAMILIES[config.family]), _shapes(config)
        rules = _expand(table, config.layers, self._shapes)
        self._theirs, self._dtype = theirs, dtype
        self._names = _their_names(table, theirs)
        _check_names(
            "Hugging Face tensors", {rule.theirs for rule in rules}, set(self._names), _optional(table, config)
        )
        if config.tied:
            _check_tied(table, theirs, self._names)
        self._rules = {name: rule for rule in rules for name in rule.ours}
        source = _on_meta(theirs) if meta is None else meta
        self.meta = {name: part for rule in rules for name, part in self._parts(rule, source).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._parts(self._rules[name], self._theirs)[name].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def _parts(self, rule: TensorRule, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors of one rule, as views of theirs where the dtype stays."""
        tensor = source[self._names[rule.theirs]]
        tensor = tensor.t() if rule.transpose else tensor
        sizes = [self._shapes[name][0] for name in rule.ours]
        expected = (sum(sizes), *self._shapes[rule.ours[0]][1:])
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{rule.theirs}: has shape {tuple(tensor.shape)}, the config says {expected}")
        parts = tensor.to(self._dtype or tensor.dtype).split(sizes)
        return dict(zip(rule.ours, parts, strict=True))


class Exported(Mapping[str, Tensor]):
    """Their tensors as a view of ours, as their files have them: a tied head is not repeated. As `Imported`."""

    def __init__(
        self,
        config: TransformerConfig,
        ours: Mapping[str, Tensor],
        meta: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        table, shapes = _map_of(FAMILIES[config.family]), _shapes(config)
        _check_names("tensors", set(shapes), set(ours), set())
        self._rules = {rule.theirs: rule for rule in _expand(table, config.layers, shapes)}
        self._ours, self.dtype = ours, dtype
        source = _on_meta(ours) if meta is None else meta
        self.meta = {name: self._joined(rule, source) for name, rule in self._rules.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._joined(self._rules[name], self._ours)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def _joined(self, rule: TensorRule, source: Mapping[str, Tensor]) -> Tensor:
        parts = [source[name] for name in rule.ours]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.to(self.dtype or tensor.dtype)
        return (tensor.t() if rule.transpose else tensor).contiguous()


def import_tensors(config: TransformerConfig, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) pairs from their tensors, in no particular dtype: each keeps its own."""
    yield from Imported(config, theirs).items()


def export_tensors(config: TransformerConfig, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their (name, tensor) pairs from our tensors, as their files have them: a tied head is not repeated."""
    yield from Exported(config, ours).items()


def _on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def _find_family(model_type: Any) -> tuple[str, Family]:
    known = {f.huggingface.model_type: (n, f) for n, f in reversed(FAMILIES.items()) if f.huggingface}
    if model_type not in known:
        raise ValueError(f"config.json: model_type={model_type!r}: expected one of {', '.join(sorted(known))}")
    return known[model_type]


def _map_of(family: Family) -> HuggingFaceMap:
    if family.huggingface is None:
        raise ValueError("this model family has no Hugging Face counterpart")
    return family.huggingface


def _shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in build_model(config).named_parameters()}


def _expand(table: HuggingFaceMap, layers: int, shapes: Mapping[str, torch.Size]) -> list[TensorRule]:
    """The rules of this model's tensors, layer by layer; a rule for a tensor that it lacks falls away."""
    rules = []
    for rule in table.tensors:
        for n in range(layers if "{n}" in rule.theirs else 1):
            ours = tuple(name.replace("{n}", str(n)) for name in rule.ours)
            if ours[0] in shapes:
                rules.append(TensorRule(rule.theirs.replace("{n}", str(n)), ours, rule.transpose))
    covered = {name for rule in rules for name in rule.ours}
    if missing := sorted(set(shapes) - covered):
        raise ValueError(f"{missing[0]}: {table.architecture} has no place for it")
    return rules


def _their_names(table: HuggingFaceMap, theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """Full name -> name as given, without buffers and with the prefix that bare stacks leave out."""
    names = [name for name in theirs if not name.endswith(table.ignored)]
    if any(name.startswith(table.prefix) for name in names):
        return {name: name for name in names}
    return {name if name == table.tied[0] else table.prefix + name: name for name in names}


def _optional(table: HuggingFaceMap, config: TransformerConfig) -> set[str]:
    return {table.tied[0]} if config.tied else set()


def _check_names(what: str, expected: set[str], found: set[str], optional: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected - optional)
    if missing or unexpected:
        parts = [f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for word, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise ValueError(f"{what} do not fit the config: {' and '.join(parts)}")


def _check_tied(table: HuggingFaceMap, theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    head, embedding = table.tied
    if head in names and not torch.equal(theirs[names[head]], theirs[names[embedding]]):
        raise ValueError(f"{head} differs from {embedding}, but the config ties them; set tie_word_embeddings to false")


def _reduced(config: TransformerConfig) -> dict[str, Any]:
    """Derived widths as null where they are what null means."""
    plain = config.num_kv_heads == config.heads, config.head_width * config.heads == config.width
    return {"kv_heads": None if plain[0] else config.kv_heads, "head_dim": None if plain[1] else config.head_dim}


def _filled(config: TransformerConfig) -> dict[str, Any]:
    """Derived widths as numbers."""
    return {"kv_heads": config.num_kv_heads, "head_dim": config.head_width, "mlp_width": config.hidden_width}


def _get(raw: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or _ABSENT."""
    node: Any = raw
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _put(raw: dict[str, Any], key: str, value: Any, field: str) -> None:
    """Write a dotted key; two fields of ours that share a key must agree."""
    *sections, last = key.split(".")
    node = raw
    for part in sections:
        node = node.setdefault(part, {})
    if node.setdefault(last, value) != value:
        raise ValueError(f"model.{field}={value!r}: shares {key} with a field that is {node[last]!r}; make them equal")
