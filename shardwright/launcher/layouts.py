"""`shardwright layouts`: the table of what cannot work, and the layouts of so many processes that a config fits.

Room launcher, beside doctor.py; the rules are those of parallel/refusals.py, which every start of a run holds as well.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardwright.config import Config
from shardwright.parallel.proposals import DEGREES, SETTINGS, describe, fitting_layouts, nearest_layouts
from shardwright.parallel.refusals import Facts, layout_warnings, refusals, table
from shardwright.train.layout import build_facts
from shardwright.train.preview import planned_world


@dataclass(frozen=True)
class Found:
    """What a config's own layout comes to in a world, and all layouts that fit there."""

    asked: Facts
    reasons: list[str]  # against the config's own layout
    warnings: list[str]
    nearest: list[Facts]  # where it is refused
    fitting: list[Facts]


def layouts(config: Config | None, world: int | None = None, limit: int = 20, json: bool = False) -> None:
    """Print the rules and, for a config, at most `limit` layouts of `world` processes that fit.

    world: by default as many as the launcher started, or as the config's degrees ask for.
    """
    found = None if config is None else find(config, world or planned_world(config))
    if json:
        print(json_module.dumps(as_dict(found, limit)))
    else:
        print("\n".join(as_lines(found, limit)))


def find(config: Config, world: int) -> Found:
    """Hold the config's layout, and every other one of `world` processes, against the rules."""
    facts = build_facts(config, world)
    reasons = refusals(facts)
    nearest = nearest_layouts(facts) if reasons else []
    return Found(facts, reasons, layout_warnings(facts), nearest, fitting_layouts(facts))


def as_lines(found: Found | None, limit: int) -> Iterator[str]:
    """For a terminal."""
    rows = table()
    width = max(len(row.name) for row in rows)
    yield "Held before any process builds anything, or the layout is refused:"
    yield from (f"  {row.name:<{width}}  {row.rule}" for row in rows if not row.warns)
    yield "Said, but not refused:"
    yield from (f"  {row.name:<{width}}  {row.rule}" for row in rows if row.warns)
    if found is None:
        return
    asked = found.asked
    yield ""
    yield f"{describe(asked)} in a world of {asked.world}: {'refused' if found.reasons else 'fits'}"
    yield from (f"  {reason}" for reason in found.reasons)
    yield from (f"  nearest that fits: {describe(layout, asked)}" for layout in found.nearest)
    yield from (f"  warning: {warning}" for warning in found.warnings)
    count, shown = len(found.fitting), found.fitting[:limit]
    yield f"{count} layout{'s' if count != 1 else ''} of {asked.world} fit{'s' if count == 1 else ''}; as config keys:"
    yield from (f"  {setting(layout)}" for layout in shown)
    if count > limit:
        yield f"  ... {count - limit} more: --limit {count}"


def as_dict(found: Found | None, limit: int) -> dict[str, Any]:
    """For JSON."""
    answer: dict[str, Any] = {"rules": [{"name": row.name, "rule": row.rule, "warns": row.warns} for row in table()]}
    if found is None:
        return answer
    return answer | {
        "world": found.asked.world,
        "asked": keys(found.asked),
        "refusals": found.reasons,
        "warnings": found.warnings,
        "nearest": [keys(layout) for layout in found.nearest],
        "fitting": len(found.fitting),
        "layouts": [keys(layout) for layout in found.fitting[:limit]],
    }


def keys(layout: Facts) -> dict[str, Any]:
    """A layout as keys of `parallel`; those that do nothing in it are left out."""
    answer: dict[str, Any] = {axis: getattr(layout, axis) for axis in DEGREES}
    idle = set()
    if layout.pipeline == 1:
        idle |= {"schedule", "stages"}
    if layout.tensor == 1:
        idle.add("sequence")
    if layout.shard is None or layout.zero == 0:
        idle.add("shard")
    return answer | {name: getattr(layout, name) for name in SETTINGS if name not in idle}


def setting(layout: Facts) -> str:
    """A layout as words of a command line."""
    given = keys(layout)
    degrees = [f"parallel.{axis}={given.pop(axis)}" for axis in DEGREES if layout.world == 1 or given[axis] > 1]
    rest = [
        f"parallel.{key}={value if isinstance(value, str) else json_module.dumps(value)}"
        for key, value in given.items()
        if key not in DEGREES
    ]
    return " ".join(degrees + rest)
