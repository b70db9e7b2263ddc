"""A config's mistakes in one line each: the key, the value, what is allowed, and what was probably meant.

Under reading.py, which calls it with what pydantic found. What looks like a secret is not repeated.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from shardwright.config.secret import shown

Section = type[BaseModel]


def describe(error: ValidationError, schema: Section, where: str) -> str:
    """The first mistake in one line, and how many more there are."""
    lines: dict[str, list[str]] = {}
    for e in error.errors(include_url=False):
        key, owner, rest = _resolve(schema, e["loc"])
        lines.setdefault(key, []).append(_one_line(e, key, owner, rest))
    first, *others = lines.values()
    # A union reports one error for each member that it tried: join what would have been allowed.
    text = " or ".join([first[0], *(line.rpartition("; ")[2] for line in first[1:])])
    return f"{where}: {text}" + (f" (and {len(others)} more)" if others else "")


def _one_line(e: Any, key: str, owner: Section | None, unknown: str) -> str:
    kind, given = e["type"], e.get("input")
    if kind == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        close = difflib.get_close_matches(unknown, known, n=1)
        return f"{key}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
    if kind == "missing":
        return f"{key}: is required and missing"
    if kind.startswith("union_tag"):
        allowed = e.get("ctx", {}).get("expected_tags", "")
        tag = e.get("ctx", {}).get("discriminator", "").strip("'")
        named = given.get(tag) if isinstance(given, dict) else given
        return f"{key}.{tag}: got {shown(named)}, expected one of {allowed}"
    if kind in ("model_type", "model_attributes_type"):
        return (
            f"{key}: got {shown(given, key)} ({type(given).__name__}); "
            f"expected a section of keys{_example(key, owner, unknown)}"
        )
    message = e["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: got {shown(given, key)} ({type(given).__name__}); {message[0].lower()}{message[1:]}"


def _example(key: str, owner: Section | None, name: str) -> str:
    """`, such as train.steps=...`, from the section that the field `name` holds."""
    field = owner.model_fields.get(name) if owner else None
    section = next(_sections(field.annotation), None) if field else None
    return f", such as {key}.{next(iter(section.model_fields))}=..." if section else ""


def _resolve(schema: Section, loc: tuple[int | str, ...]) -> tuple[str, Section | None, str]:
    """(dotted key without union tags, the section class that holds the last part, the last part)."""
    owner: Section | None = schema
    parts: list[str] = []
    choices: list[Section] = []
    for part in loc:
        tagged = [c for c in choices if len(choices) > 1 and part in _tags(c)]
        if tagged:
            owner, choices = tagged[0], []
            continue
        if choices:
            owner = choices[0]
        is_key = isinstance(part, int) or owner is None or part in owner.model_fields or not _is_type_tag(str(part))
        if not is_key:
            continue
        parts.append(str(part))
        field = owner.model_fields.get(str(part)) if owner else None
        choices = list(_sections(field.annotation)) if field else choices
    return ".".join(parts), owner, parts[-1] if parts else ""


def _is_type_tag(part: str) -> bool:
    """Pydantic adds the tried member of a plain union to the location: 'int', "literal['auto']", ..."""
    return part.removeprefix("constrained-") in ("int", "float", "str", "bool") or "[" in part


def _tags(section: Section) -> tuple[Any, ...]:
    for name in ("family", "name"):
        if name in section.model_fields:
            return getattr(section.model_fields[name].annotation, "__args__", ())
    return ()


def _sections(annotation: Any) -> Iterator[Section]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections(inner)
