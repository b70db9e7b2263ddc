"""Configs from YAML, names and ``key=value``, strictly, with errors made for people; and back to YAML."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml
from pydantic import Field, ValidationError, create_model
from yaml.composer import ComposerError

from shardwright.config.fields import ConfigError, Strict
from shardwright.config.mistakes import describe
from shardwright.config.secret import BY_NAME, IN_A_URL, find_secret, is_secret_name, secret_key, secret_text, shown
from shardwright.config.sections import Config, ModelConfig, ObjectiveConfig

S = TypeVar("S", bound=Strict)


def build_schema(
    models: Mapping[str, type[ModelConfig]], objectives: Mapping[str, type[ObjectiveConfig]]
) -> type[Config]:
    """The Config class with `model` and `objective` typed by the given tables."""
    fields: dict[str, Any] = {
        "model": (_tagged_union(models, "family"), ...),
        "objective": (_tagged_union(objectives, "name"), ...),
    }
    return create_model("Config", __base__=Config, __doc__="A complete shardwright run.", **fields)


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    schema: type[Config],
) -> Config:
    """Read a config by file, name or mapping and apply ``key=value`` overrides.

    Raises ConfigError with one line that names the key, the value and what is allowed.
    """
    if isinstance(source, Mapping):
        where, raw = "config", copy.deepcopy(dict(source))
    else:
        path = find_config(source)
        where, raw = str(path), read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return parse(schema, raw, where)


def parse(schema: type[S], raw: Mapping[str, Any], where: str) -> S:
    """Validate `raw` against a section class; ConfigError with one line otherwise, also where it holds a secret."""
    place = secret_text(raw)
    if place is not None:
        raise ConfigError(f"{where}: {place or 'a key'}: {IN_A_URL}")
    try:
        section = schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe(error, schema, where)) from None
    for key, free_keys in _free_sections(section):
        inner = secret_key(free_keys)
        if inner is not None:
            raise ConfigError(f"{where}: {key}.{inner}: {BY_NAME}")
    return section


def find_config(name: str | Path) -> Path:
    """A config by path, or by name among the configs shipped with the project."""
    given = Path(name)
    for candidate in (given, Path(f"{given}.yaml")):
        if candidate.is_file():
            return candidate
    shipped = {str(p.relative_to(folder).with_suffix("")): p for folder in config_folders() for p in _yamls(folder)}
    stem = str(name).removesuffix(".yaml").removeprefix("configs/")
    if stem in shipped:
        return shipped[stem]
    close = difflib.get_close_matches(stem, shipped, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"shipped configs: {', '.join(sorted(shipped))}"
    if not str(name):
        raise ConfigError(f"config: is empty; expected a file or a name; {hint}")
    what = "is a folder, not a config file" if given.is_dir() else "no such config file"
    raise ConfigError(f"{name}: {what}; {hint}")


def config_folders() -> list[Path]:
    """Where shipped configs lie: the installed package's folder, or the checkout's."""
    package = Path(__file__).parents[1]
    return [f for f in (package / "configs", package.parent / "configs") if f.is_dir()][:1]


def _yamls(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.yaml")) if p.parent.name != "hardware"]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as everyone who writes them means them, and refuses a key that stands twice.

    1e-3 is a number; 010 and 1:30 are none, where YAML 1.1 has octal 8 and 90 seconds; a date stays text.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ComposerError(problem=f"{key.value!r} stands twice; keep one", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)",
    "tag:yaml.org,2002:float": r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*"
    r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _REPLACED]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; ConfigError names the file and line of a syntax error."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: is not valid YAML: {getattr(error, 'problem', error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections such as model: and train:, found {shown(raw)}")
    return raw


def to_yaml(config: Strict) -> str:
    """The fully resolved config as YAML, in the schema's order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """`meaning` fields on which two configs disagree: (key, old value, new value)."""
    mine, theirs = dict(_meanings(old)), dict(_meanings(new))
    return [(k, mine.get(k), theirs.get(k)) for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]


def _tagged_union(table: Mapping[str, type[Strict]], tag: str) -> Any:
    members = tuple(dict.fromkeys(table.values()))
    return Annotated[Union[members], Field(discriminator=tag)] if len(members) > 1 else members[0]  # noqa: UP007


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a raw mapping from ``key=value``; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shown(override)}: expected key=value, for example train.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "a character that YAML does not have"
        said = repr(f"{key}=...") if is_secret_name(key) and not find_secret(key) else shown(override)
        raise ConfigError(f"{said}: the value is not valid YAML: {problem}; put quotes around plain text") from None
    *parents, leaf = key.split(".")
    node: Any = raw
    for number, part in enumerate(parents):
        place = _place(node, part, ".".join(parents[:number]))
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]
    node[_place(node, leaf, ".".join(parents))] = value


def _place(node: Any, part: str, where: str) -> str | int:
    """The key or index that `part` of a dotted key means in `node`, which stands at `where`."""
    if not isinstance(node, dict | list):
        raise ConfigError(f"{where}.{part}: {where} is a single value, not a section")
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    if isinstance(node, list) or (where and part.isdigit() and not node):
        raise ConfigError(f"{where}.{part}: {where} has no entry {part}; give the whole list, as in {where}=[...]")
    return part


def _free_sections(section: Strict, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key, section) of those that take any key."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Strict):
            yield from _free_sections(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            yield f"{prefix}{name}", value


def _meanings(section: Strict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every leaf in which two runs must agree."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("role") == "free":
            continue
        if isinstance(value, Strict):
            yield from _meanings(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(v, Strict) for v in value):
            for index, item in enumerate(value):
                yield from _meanings(item, f"{key}.{index}.")
        else:
            yield key, value
