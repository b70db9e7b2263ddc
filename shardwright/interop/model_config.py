"""The content of a config.json to our model's config and back, from the maps that families carry as data.

Stands on model/families.py; huggingface.py does the same for tensors. What theirs asks for and ours does not do, or the
other way round, is an error that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwright.config import parse
from shardwright.model.families import FAMILIES
from shardwright.model.family import Family, HuggingFaceMap, OneOf, Whatever
from shardwright.model.transformer import TransformerConfig

_ABSENT = object()
_SYNONYMS = {"swish": "silu"}  # of activations


def read_config(raw: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]] | None = None) -> TransformerConfig:
    """Our config from the content of a config.json, theirs where it is silent; ValueError where ours cannot say it.

    `beside`: by folder, the content of those of the models that ours holds as well (ELECTRA's generator).
    """
    name, family = _find_family(raw.get("model_type"))
    table = map_of(family)
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
    table = map_of(FAMILIES[config.family], folder)
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
    return list(map_of(_find_family(raw.get("model_type"))[1]).beside)


def folders_beside(config: TransformerConfig) -> list[str]:
    """Folders inside an exported one, of models of theirs that ours holds as well."""
    beside = map_of(FAMILIES[config.family]).beside.items()
    return [folder for folder, part in beside if any(getattr(config, f) != v for f, v in part.absent.items())]


def as_they_compute(config: TransformerConfig, folder: str = "") -> TransformerConfig:
    """The model that their code makes of an exported folder: without the parts that it lacks."""
    return config.model_copy(update=dict(map_of(FAMILIES[config.family], folder).lacks))


def called_for(config: TransformerConfig, folder: str = "") -> str:
    """The method of our model that gives what the model in an exported folder gives."""
    beside = map_of(FAMILIES[config.family]).beside
    return beside[folder].method if folder else "forward"


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


def map_of(family: Family, folder: str = "") -> HuggingFaceMap:
    if family.huggingface is None:
        raise ValueError("this model family has no Hugging Face counterpart")
    return family.huggingface.beside[folder].map if folder else family.huggingface


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
