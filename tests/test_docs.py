"""The documentation says what is so: its links lead somewhere, its commands parse, its list of keys is the schema's.

`python tests/test_docs.py` writes docs/keys.md anew from the schema.
"""

import re
import shlex
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import typer
import yaml
from pydantic.fields import FieldInfo

from shardwright.config import Strict, apply_override
from shardwright.data.prepare.options import PrepareConfig
from shardwright.launcher.cli import app
from shardwright.model.families import FAMILIES
from shardwright.objective.table import OBJECTIVES
from shardwright.train.layout import build_facts
from shardwright.train.preview import rank_memory
from shardwright.train.settings import SCHEMA, read_config

ROOT = Path(__file__).resolve().parents[1]
KEYS = ROOT / "docs/keys.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WORDS = {str: "text", int: "integer", float: "number", bool: "true, false", types.NoneType: "null"}


# ------------------------------------------------------------------------------------------ the list of keys


def allowed(annotation: Any) -> str:
    """A field's type in a few words, as `integer or null`."""
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        return f"{allowed(inner)}{limits(*rest)}"
    if get_origin(annotation) is Literal:
        return ", ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(allowed(member) for member in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {allowed(get_args(annotation)[0])}".replace("section", "sections")
    if get_origin(annotation) is dict:
        return "mapping"
    return WORDS.get(annotation, "section")


def limits(field: FieldInfo) -> str:
    """Bounds of a number, as `, >= 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [(sign, getattr(item, name, None)) for item in field.metadata for name, sign in signs.items()]
    return "".join(f", {sign} {bound}" for sign, bound in bounds if bound is not None)


def shown(field: FieldInfo) -> str:
    """A default as YAML would write it."""
    return "required" if field.is_required() else yaml.safe_dump(field.default, default_flow_style=True).splitlines()[0]


def section_in(annotation: Any) -> type[Strict] | None:
    """The section class that an annotation is or holds, as in `list[SourceConfig]` or `RampConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def rows(section: type[Strict], prefix: str = "") -> Iterator[str]:
    """Table rows of a section's keys, those of inner sections in their place."""
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is not field.annotation:
            extra = field.json_schema_extra
            role = extra.get("role", "meaning") if isinstance(extra, dict) else "meaning"
            kinds = f"{allowed(field.annotation)}{limits(field)}"
            yield f"| `{prefix}{name}` | {shown(field)} | {kinds} | {field.description} | {role} |"
        if inner is not None:
            number = "0." if get_origin(field.annotation) is list else ""
            yield from rows(inner, f"{prefix}{name}.{number}")


HEAD = "| key | default | allowed | what it is | role |\n|---|---|---|---|---|"


def reference() -> str:
    """The whole page of keys."""
    model = {name: family.config.model_fields for name, family in FAMILIES.items()}
    keys = {key: field for fields in reversed(model.values()) for key, field in fields.items()}
    order = dict.fromkeys(key for fields in model.values() for key in fields)
    parts = [
        "# Every key",
        "Written from the schema by `python tests/test_docs.py`; a test fails when it is out of date. Keys of role"
        " *meaning* belong to what a run computes: a run folder goes on only where all of them match. *free* ones may"
        " change between two starts of the same run.",
        "## A run: `shardwright train`",
    ]
    for section, field in SCHEMA.model_fields.items():
        inner = field.annotation
        if section == "model":
            head = f"| key | {' | '.join(model)} | allowed | what it is |\n|---{'|---' * (len(model) + 2)}|"
            lines = (
                f"| `model.{key}` | {' | '.join(shown(f[key]) if key in f else '' for f in model.values())} "
                f"| {allowed(keys[key].annotation) if key != 'family' else ', '.join(model)}{limits(keys[key])} "
                f"| {keys[key].description} |"
                for key in order
            )
            sizes = (f"`{name}`: {', '.join(getattr(f.config, 'SIZES', {}))}" for name, f in FAMILIES.items())
            parts += [
                "### model",
                "Defaults by family; a key without one is not of that family.",
                "\n".join([head, *lines]),
                f"Sizes: {'; '.join(sizes)}.",
            ]
        elif section == "objective":
            parts += ["### objective", "By its name; [Objectives](objectives.md) says what each does."]
            for name, (config, _) in OBJECTIVES.items():
                parts += [f"#### {name}", "\n".join([HEAD, *rows(config, f"{section}.")])]
        elif (found := section_in(inner)) is not None:  # also where it may be null
            parts += [f"### {section}", "\n".join([HEAD, *rows(found, f"{section}.")])]
    top = [row for row in rows(SCHEMA) if row.startswith(("| `run` ", "| `begin` ", "| `engine` "))]
    parts += ["### run, begin, engine", "\n".join([HEAD, *top])]
    parts += ["## A corpus: `shardwright prepare`", "\n".join([HEAD, *rows(PrepareConfig)])]
    return "\n\n".join(parts) + "\n"


def test_the_list_of_keys_is_the_schema() -> None:
    """docs/keys.md is what the schema says today."""
    assert KEYS.read_text("utf-8") == reference(), "run: python tests/test_docs.py"


# ------------------------------------------------------------------------------------------ links and commands


def links(page: Path) -> Iterator[str]:
    """Targets of a page's links that lead to files of the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "mailto:", "#")):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, and a heading stands behind each anchor."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


def commands(page: Path) -> Iterator[list[str]]:
    """Every `$ shardwright ...` line of a page's console blocks, as words."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text("utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ shardwright "):
                yield shlex.split(line, comments=True)[2:]


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    """Each names a command and options that exist, and settings that the schema knows."""
    group = typer.main.get_command(app)
    for words in commands(page):
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        context = command.make_context(words[0], words[1:], resilient_parsing="--help" in words)
        settings = [word for word in words[1:] if re.match(r"[a-z_.0-9]+=", word)]
        if words[0] == "train":
            read_config(context.params["config"], settings)
        elif words[0] == "prepare":
            raw: dict[str, Any] = {"input": ["x"], "output": "y"}
            for setting in settings:
                apply_override(raw, setting)
            PrepareConfig.model_validate(raw)


def test_the_colab_config_fits_a_t4() -> None:
    """docs/single-device.md promises it of 16 GB; the tokenizer there has 8,192 tokens, others up to 50,257."""
    config = read_config("colab", ["model.vocab_size=50257"])
    assert config.precision.compute == "fp16"
    assert rank_memory(config, build_facts(config, 1))["total"] < 0.8 * 16e9


if __name__ == "__main__":
    KEYS.write_text(reference(), "utf-8")
    print(f"wrote {KEYS.relative_to(ROOT)}")
