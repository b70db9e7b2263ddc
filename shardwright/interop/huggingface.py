"""Hugging Face's tensors to ours and back, from the maps that families carry as data.

Stands on model/families.py, beside model_config.py. Either side is a view of the other's tensors, made one at a time,
so that what reads lazily is never held whole. Every tensor is accounted for: what is missing, unexpected or of another
shape is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from shardwright.interop.model_config import folders_beside, map_of
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.family import HuggingFaceMap, TensorRule
from shardwright.model.transformer import TransformerConfig

_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in files that were TensorFlow's first


class Imported(Mapping[str, Tensor]):
    """Our tensors as a view of theirs: each is made when it is asked for.

    All of ours, or those that the model in `folder` holds; `spare` are names of theirs that have no place. `meta` holds
    theirs on the meta device where `theirs` reads; ours are in the attribute of that name. `dtype` None leaves each its
    own. ValueError where names or shapes do not fit the config.
    """

    def __init__(
        self,
        config: TransformerConfig,
        theirs: Mapping[str, Tensor],
        meta: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        folder: str = "",
    ) -> None:
        table, self._shapes = map_of(FAMILIES[config.family], folder), model_shapes(config)
        _check_covered(config, self._shapes)
        rules = _expand(table, config, self._shapes)
        self._config, self._theirs, self._dtype = config, theirs, dtype
        self._names = _their_names(table, theirs)
        expected = {rule.theirs for rule in rules}
        _check_names("Hugging Face tensors", expected, set(self._names), _optional(table, config))
        self.spare = sorted((set(table.spare) & set(self._names)) - expected)
        _check_copies(table, config, theirs, self._names)
        _check_zero({name: table.zero[name] for name in table.zero if name not in expected}, theirs, self._names)
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
        return parts_of(rule, tensor.to(self._dtype or tensor.dtype), self._config, self._shapes)


def parts_of(
    rule: TensorRule, tensor: Tensor, config: TransformerConfig, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Our tensors in one of theirs; ValueError where it is of another shape than the config says."""
    tensor = tensor.squeeze(0) if rule.row and tensor.dim() > 1 else tensor
    sizes = [shapes[name][0] for name in rule.ours]
    joined = (sum(sizes), *shapes[rule.ours[0]][1:])
    lying = joined[::-1] if rule.transpose else joined
    expected = lying if rule.shape is None else rule.shape(config)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{rule.theirs}: has shape {tuple(tensor.shape)}, the config says {expected}")
    tensor = tensor.reshape(lying)
    return dict(zip(rule.ours, rule.split(tensor.t() if rule.transpose else tensor, sizes, config.heads), strict=True))


class ImportedTogether(Mapping[str, Tensor]):
    """Our tensors from all of their models that ours holds, by folder; "" is the one that gives its name.

    ValueError where one is missing, or what two of them name is not equal in both.
    """

    def __init__(self, config: TransformerConfig, parts: Mapping[str, Imported]) -> None:
        if missing := [folder for folder in folders_beside(config) if folder not in parts]:
            raise ValueError(f"Hugging Face tensors do not fit the config: those of its {missing[0]} are missing")
        self._of: dict[str, Imported] = {}
        for folder, part in parts.items():
            for name in part:
                if name in self._of and not torch.equal(self._of[name][name], part[name]):
                    raise ValueError(f"{folder}: {name} differs from that beside it, but one is trained for both")
                self._of.setdefault(name, part)
        self.meta = {name: part.meta[name] for name, part in self._of.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


class Exported(Mapping[str, Tensor]):
    """Their tensors as a view of ours, as their files have them: a tied head is not repeated. As `Imported`."""

    def __init__(
        self,
        config: TransformerConfig,
        ours: Mapping[str, Tensor],
        meta: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        folder: str = "",
    ) -> None:
        table, shapes = map_of(FAMILIES[config.family], folder), model_shapes(config)
        _check_names("tensors", set(shapes), set(ours), set())
        _check_covered(config, shapes)
        self._rules = {rule.theirs: rule for rule in _expand(table, config, shapes)}
        self._config, self._ours, self.dtype = config, ours, dtype
        source = _on_meta(ours) if meta is None else meta
        self.meta = {name: self._joined(rule, source) for name, rule in self._rules.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._joined(self._rules[name], self._ours)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def _joined(self, rule: TensorRule, source: Mapping[str, Tensor]) -> Tensor:
        return joined_of(rule, source, self._config, self.dtype)


def joined_of(
    rule: TensorRule, ours: Mapping[str, Tensor], config: TransformerConfig, dtype: torch.dtype | None = None
) -> Tensor:
    """One of their tensors, of ours."""
    tensor = rule.join([ours[name] for name in rule.ours], config.heads)
    tensor = tensor.to(dtype or tensor.dtype)
    tensor = tensor.unsqueeze(0) if rule.row else tensor
    tensor = tensor.t() if rule.transpose else tensor
    return (tensor if rule.shape is None else tensor.reshape(rule.shape(config))).contiguous()


def rules_of(config: TransformerConfig) -> list[TensorRule]:
    """The rules of a model's tensors, layer by layer; ValueError where theirs has no place for one."""
    shapes = model_shapes(config)
    _check_covered(config, shapes)
    return _expand(map_of(FAMILIES[config.family]), config, shapes)


def names_of_embedding(config: TransformerConfig) -> tuple[str, ...]:
    """Their names of the embedding of tokens, and of a head that is the same."""
    table = map_of(FAMILIES[config.family])
    return (*(table.tied if config.tied else table.tied[1:]), *table.copies)


def import_all(config: TransformerConfig, sources: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) pairs from all of their models that ours holds, by folder; see `ImportedTogether`."""
    parts = {folder: Imported(config, tensors, folder=folder) for folder, tensors in sources.items()}
    yield from ImportedTogether(config, parts).items()


def import_tensors(
    config: TransformerConfig, theirs: Mapping[str, Tensor], folder: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) pairs from their tensors, in no particular dtype: each keeps its own."""
    yield from Imported(config, theirs, folder=folder).items()


def export_tensors(
    config: TransformerConfig, ours: Mapping[str, Tensor], folder: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Their (name, tensor) pairs from our tensors, as their files have them: a tied head is not repeated."""
    yield from Exported(config, ours, folder=folder).items()


def _on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def model_shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    """The shape of each of our tensors by name."""
    with torch.device("meta"):
        return {name: p.shape for name, p in build_model(config).named_parameters()}


def _expand(table: HuggingFaceMap, config: TransformerConfig, shapes: Mapping[str, torch.Size]) -> list[TensorRule]:
    """The rules of this model's tensors, layer by layer; a rule for a tensor that it lacks falls away."""
    rules = []
    for rule in table.tensors:
        if rule.when is not None and getattr(config, rule.when[0]) != rule.when[1]:
            continue
        for mark, number, ours_number in _layers_of(rule, config):
            names = (name.replace("{last}", str(config.num_blocks - 1)) for name in rule.ours)
            ours = tuple(name.replace(mark, str(ours_number)) for name in names)
            if ours[0] in shapes:
                rules.append(replace(rule, theirs=rule.theirs.replace(mark, str(number)), ours=ours))
    return rules


def _check_covered(config: TransformerConfig, shapes: Mapping[str, torch.Size]) -> None:
    """ValueError where their models have no place for one of our tensors."""
    table = map_of(FAMILIES[config.family])
    tables = [table, *(part.map for part in table.beside.values())]
    covered = {name for one in tables for rule in _expand(one, config, shapes) for name in rule.ours}
    if missing := sorted(set(shapes) - covered):
        raise ValueError(f"{missing[0]}: {table.architecture} has no place for it")


def _layers_of(rule: TensorRule, config: TransformerConfig) -> Iterator[tuple[str, int, int]]:
    """(mark, their number, our number) of each layer that a rule is for; once where it is of none."""
    if "{m}" in rule.theirs:
        yield from (("{m}", number, ours) for number, ours in enumerate(config.runs[-1]))
    elif "{n}" in rule.theirs:
        inner = getattr(config, "generator", config).layers
        yield from (("{n}", number, number) for number in range(max(config.layers, inner)))
    else:
        yield "{n}", 0, 0


def _their_names(table: HuggingFaceMap, theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """Full name -> name as given, without buffers and with the prefix that bare stacks leave out."""
    names = [name for name in theirs if not name.endswith(table.ignored)]
    if any(name.startswith(table.prefix) for name in names):
        return {_renamed(table, name): name for name in names}
    outside = {rule.theirs for rule in table.tensors if not rule.theirs.startswith(table.prefix)}
    found = {_renamed(table, name): name for name in names}
    return {name if name in outside else table.prefix + name: given for name, given in found.items()}


def _renamed(table: HuggingFaceMap, name: str) -> str:
    """A name as the rules have it."""
    for old, ending in _OLD_ENDINGS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + ending
    for other, ours in table.aliases.items():
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


def _optional(table: HuggingFaceMap, config: TransformerConfig) -> set[str]:
    return {*table.copies, *table.zero, *table.spare, *([table.tied[0]] if config.tied else [])}


def _check_names(what: str, expected: set[str], found: set[str], optional: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected - optional)
    if missing or unexpected:
        parts = [f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for word, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise ValueError(f"{what} do not fit the config: {' and '.join(parts)}")


def _check_copies(
    table: HuggingFaceMap, config: TransformerConfig, theirs: Mapping[str, Tensor], names: Mapping[str, str]
) -> None:
    """ValueError where a tensor that is the embedding under another name is not."""
    head, embedding = table.tied
    if config.tied and _differs(head, embedding, theirs, names):
        raise ValueError(f"{head} differs from {embedding}, but the config ties them; set tie_word_embeddings to false")
    for copy in table.copies:
        if _differs(copy, embedding, theirs, names):
            raise ValueError(f"{copy} differs from {embedding}: tables of their own are not supported here")


def _differs(copy: str, embedding: str, theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> bool:
    return copy in names and not torch.equal(theirs[names[copy]], theirs[names[embedding]])


def _check_zero(places: Mapping[str, str], theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """ValueError where a tensor that has no place is not zero; `places` say how it gets one."""
    for name in places.keys() & names.keys():
        if theirs[names[name]].any():
            raise ValueError(f"{name}: is not zero, and the config has no place for it; set {places[name]}")
