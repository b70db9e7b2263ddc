"""Hugging Face's config and tensors to ours and back, from the maps that families carry as data.

Stands on model/families.py. Either side's tensors are a view of the other's, made one at a time, so that what reads
lazily is never held whole. Every tensor is accounted for: what is missing, unexpected or of another shape is an error
that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwright.config import parse
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.family import Family, HuggingFaceMap, OneOf, TensorRule, Whatever
from shardwright.model.transformer import TransformerConfig

_ABSENT = object()
_SYNONYMS = {"swish": "silu"}  # of activations
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in files that were TensorFlow's first


def read_config(raw: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]] | None = None) -> TransformerConfig:
    """Our config from the content of a config.json, theirs where it is silent; ValueError where ours cannot say it.

    `beside`: by folder, the content of those of the models that ours holds as well (ELECTRA's generator).
    """
    name, family = _find_family(raw.get("model_type"))
    table = _map_of(family)
    for folder, part in table.beside.items():
        if _architecture(raw, table) == part.map.architecture:
            raise ValueError(
                f"config.json: {part.map.architecture} is half a model here; put it into a folder {folder} inside that "
                f"of its {table.architecture}"
            )
    fields = {"family": name, **_read_fields(table, raw)}
    for folder, part in table.beside.items():
        if beside is None or folder not in beside:
            fields.update(part.absent)
            continue
        for field, value in _read_fields(part.map, beside[folder]).items():
            if fields.setdefault(field, value) != value:
                raise ValueError(
                    f"{folder}/config.json: says {value!r} of what is {fields[field]!r} beside it ({field})"
                )
    return parse(family.config, fields, "config.json")


def _read_fields(table: HuggingFaceMap, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the content of one config.json."""
    if raw.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is not supported here; take the weights before quantisation")
    raw = {**table.defaults, **raw}
    for key, expected in table.theirs.items():
        found = _get(raw, key)
        if found is not _ABSENT and expected != found:
            raise ValueError(f"config.json: {key}={found!r} is not supported here; expected {expected!r}")
    fields: dict[str, Any] = {**table.variants.get(_architecture(raw, table), {})}
    if fields.get("classify", "none") != "none":
        fields["classes"] = _read_classes(raw, table)
    for keys in table.alike:
        _check_alike({key: raw[key] for key in keys if raw.get(key) is not None})
    for field, keys in table.fields.items():
        found = next((v for v in (_get(raw, k) for k in keys) if v is not _ABSENT), _ABSENT)
        if found is not _ABSENT:
            fields[field] = int(found) - table.shifts[field] if field in table.shifts else found  # type: ignore[call-overload]
    for field, (key, values) in table.values.items():
        found = _get(raw, key)
        found = _SYNONYMS.get(found, found) if isinstance(found, str) else found
        matches = [ours for ours, theirs in values.items() if theirs == found]
        if found is not _ABSENT and not matches:
            raise ValueError(f"config.json: {key}={found!r}: expected one of {', '.join(map(repr, values.values()))}")
        fields.update({field: matches[0]} if matches else {})
    return {**fields, **table.read(raw)}


def _read_classes(raw: Mapping[str, Any], table: HuggingFaceMap) -> int:
    """How many classes an architecture tells; ValueError where it does so otherwise than ours."""
    for key, expected in {**table.classifying, "problem_type": OneOf(None, "single_label_classification")}.items():
        if key in raw and expected != raw[key]:
            raise ValueError(f"config.json: {key}={raw[key]!r} is not supported here; expected {expected!r}")
    names = raw.get("id2label")
    return len(names) if names else int(raw.get("num_labels") or 2)


def _write_classes(config: TransformerConfig, table: HuggingFaceMap) -> dict[str, Any]:
    """What config.json says of classes; their names are numbers."""
    if config.classify == "none":
        return {}
    names = {str(n): f"LABEL_{n}" for n in range(config.classes)}
    return {**table.classifying, "id2label": names, "label2id": {name: int(n) for n, name in names.items()}}


def write_config(config: TransformerConfig, folder: str = "") -> dict[str, Any]:
    """The content of a config.json; ValueError where theirs cannot say what ours does.

    `folder`: of a model that ours holds as well, see `folders_beside`.
    """
    table = _map_of(FAMILIES[config.family], folder)
    given = config.model_dump() | _reduced(config)
    for field, expected in table.ours.items():
        if given[field] != expected:
            raise ValueError(
                f"model.{field}={given[field]!r}: {table.architecture} has {expected!r} and cannot say otherwise"
            )
    filled = config.model_dump() | _filled(config)
    raw: dict[str, Any] = {"model_type": table.model_type, "architectures": [_architecture_of(table, filled)]}
    for field, keys in table.fields.items():
        value = filled[field] + table.shifts[field] if field in table.shifts else filled[field]
        for key in keys:
            _put(raw, key, value, field)
    for field, (key, values) in table.values.items():
        if filled[field] not in values:
            raise ValueError(f"model.{field}={filled[field]!r}: {table.architecture} has {', '.join(values)} alone")
        _put(raw, key, values[filled[field]], field)
    for key, value in table.theirs.items():
        said = value.values[0] if isinstance(value, OneOf) else value
        if said is not None or isinstance(value, Whatever):
            _put(raw, key, said, key)
    for section, said in table.write(config).items():
        raw[section] = {**raw.get(section, {}), **said}
    return raw | _write_classes(config, table)


def may_be_beside(raw: Mapping[str, Any]) -> list[str]:
    """Folders inside the one of this config.json that may hold models of theirs which ours holds as well."""
    return list(_map_of(_find_family(raw.get("model_type"))[1]).beside)


def folders_beside(config: TransformerConfig) -> list[str]:
    """Folders inside an exported one, of models of theirs that ours holds as well."""
    beside = _map_of(FAMILIES[config.family]).beside.items()
    return [folder for folder, part in beside if any(getattr(config, f) != v for f, v in part.absent.items())]


def as_they_compute(config: TransformerConfig, folder: str = "") -> TransformerConfig:
    """The model that their code makes of an exported folder: without the parts that it lacks."""
    return config.model_copy(update=dict(_map_of(FAMILIES[config.family], folder).lacks))


def called_for(config: TransformerConfig, folder: str = "") -> str:
    """The method of our model that gives what the model in an exported folder gives."""
    beside = _map_of(FAMILIES[config.family]).beside
    return beside[folder].method if folder else "forward"


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
        table, self._shapes = _map_of(FAMILIES[config.family], folder), model_shapes(config)
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
        table, shapes = _map_of(FAMILIES[config.family], folder), model_shapes(config)
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
    return _expand(_map_of(FAMILIES[config.family]), config, shapes)


def names_of_embedding(config: TransformerConfig) -> tuple[str, ...]:
    """Their names of the embedding of tokens, and of a head that is the same."""
    table = _map_of(FAMILIES[config.family])
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


def _find_family(model_type: Any) -> tuple[str, Family]:
    known = {f.huggingface.model_type: (n, f) for n, f in reversed(FAMILIES.items()) if f.huggingface}
    if model_type not in known:
        raise ValueError(f"config.json: model_type={model_type!r}: expected one of {', '.join(sorted(known))}")
    return known[model_type]


def _architecture(raw: Mapping[str, Any], table: HuggingFaceMap) -> str:
    """What a config.json says that it is, or what its type is by default."""
    return next(iter(raw.get("architectures") or ()), table.architecture)


def _architecture_of(table: HuggingFaceMap, given: Mapping[str, Any]) -> str:
    """The variant that has all of these fields; without variants the only one."""
    for architecture, fields in table.variants.items():
        if all(given[field] == value for field, value in fields.items()):
            return architecture
    return table.architecture


def _map_of(family: Family, folder: str = "") -> HuggingFaceMap:
    if family.huggingface is None:
        raise ValueError("this model family has no Hugging Face counterpart")
    return family.huggingface.beside[folder].map if folder else family.huggingface


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
    table = _map_of(FAMILIES[config.family])
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


def _check_alike(found: Mapping[str, Any]) -> None:
    """ValueError where keys that one field of ours stands for differ."""
    if len(set(found.values())) > 1:
        given = ", ".join(f"{key}={value!r}" for key, value in found.items())
        raise ValueError(f"config.json: {given}: are not supported here; expected them to be equal")


def _reduced(config: TransformerConfig) -> dict[str, Any]:
    """Derived widths as null where they are what null means."""
    plain = config.num_kv_heads == config.heads, config.head_width * config.heads == config.width
    return {"kv_heads": None if plain[0] else config.kv_heads, "head_dim": None if plain[1] else config.head_dim}


def _filled(config: TransformerConfig) -> dict[str, Any]:
    """Derived widths as numbers."""
    return config.derived()


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
