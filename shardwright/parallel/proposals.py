"""Layouts that work: a config's own checked, the nearest where it does not, and all of a world.

Above refusals.py, whose table says what does not.
"""

from __future__ import annotations

import json
import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from shardwright.config import ConfigError
from shardwright.parallel.refusals import Facts, is_fixed, refusals, shards_fit
from shardwright.parallel.stages import SCHEDULES

DEGREES = ("data", "context", "tensor", "pipeline")
SETTINGS = ("shard", "zero", "schedule", "stages", "sequence", "ring")


def check_layout(facts: Facts) -> None:
    """ConfigError with every reason and the nearest layouts that fit, unless this one does.

    Where no layout can fit, each reason has its own remedy, and none is proposed.
    """
    reasons = refusals(facts)
    if not reasons:
        return
    if is_fixed(facts):
        raise ConfigError("; ".join(reasons))
    near = [describe(layout, facts) for layout in nearest_layouts(facts)]
    found = f"nearest that fit: {' or '.join(near)}" if near else f"no other layout of a world of {facts.world} fits"
    raise ConfigError(f"{'; '.join(reasons)}; {found}")


def describe(layout: Facts, asked: Facts | None = None) -> str:
    """Degrees over 1 as config keys, and the settings in which `layout` differs from `asked`."""
    degrees = [f"{axis}={getattr(layout, axis)}" for axis in DEGREES if getattr(layout, axis) > 1] or ["data=1"]
    changed = {key: getattr(layout, key) for key in SETTINGS if key in _changes(layout, asked or layout)}
    return " ".join(degrees + [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changed.items()])


def nearest_layouts(facts: Facts, limit: int = 3) -> list[Facts]:
    """At most `limit` layouts of the same world that no row refuses, the most like `facts` first.

    A setting (ZeRO stage, schedule, ...) is changed only where the degrees do not fit without.
    """
    found: list[tuple[float, int, Facts]] = []
    number = 0
    for far, degrees in sorted((_distance(facts, d), d) for d in factorisations(facts.world, len(DEGREES))):
        bound = found[limit - 1][0] if len(found) >= limit else math.inf
        if far >= bound:
            break
        fitting: list[Facts] = []
        for cost, layout in _settings(_with_degrees(facts, degrees)):
            if far + cost >= bound or len(fitting) == limit:
                break
            changes = _changes(layout, facts)
            if any(_changes(other, facts) <= changes for other in fitting) or refusals(layout):
                continue
            fitting.append(layout)
            number += 1
            insort(found, (far + cost, number, layout))
    return [layout for _, _, layout in found[:limit]]


def fitting_layouts(facts: Facts) -> list[Facts]:
    """Every layout of the world that fits, in a fixed order: all degrees with all settings that matter to them."""
    layouts = [
        layout
        for degrees in factorisations(facts.world, len(DEGREES))
        for _, layout in _settings(_with_degrees(facts, degrees))
        # One rank alone has nothing to share out: listed once, unless DeepSpeed's stage says what goes to the host.
        if (layout.zero == 0 or layout.data * layout.context > 1 or facts.is_offloaded) and not refusals(layout)
    ]
    return sorted(layouts, key=_order)


def _order(f: Facts) -> tuple[int, ...]:
    schedule = list(SCHEDULES).index(f.schedule)
    return (f.pipeline, f.tensor, f.context, f.data, f.zero, schedule, f.stages, int(not f.sequence))


@lru_cache
def factorisations(number: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Every way to write `number` as an ordered product of `count` factors."""
    if count == 1:
        return ((number,),)
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return tuple((d, *rest) for d in divisors for rest in factorisations(number // d, count - 1))


def _with_degrees(facts: Facts, degrees: tuple[int, ...]) -> Facts:
    data, context, tensor, pipeline = degrees
    return replace(facts, data=data, context=context, tensor=tensor, pipeline=pipeline)


def _distance(facts: Facts, degrees: tuple[int, ...]) -> float:
    """Doublings and halvings between two sets of degrees; of the data degree, which mostly fills up, half as many."""
    far = 0.0
    for axis, degree in zip(DEGREES, degrees, strict=True):
        far += (0.5 if axis == "data" else 1.0) * abs(math.log2(degree / getattr(facts, axis)))
    return round(far, 6)


def _changes(layout: Facts, asked: Facts) -> set[str]:
    """Settings that differ."""
    return {key for key in SETTINGS if getattr(layout, key) != getattr(asked, key)}


def _settings(facts: Facts) -> Iterator[tuple[float, Facts]]:
    """`facts` with each choice of the settings that matter to its degrees, cheapest change first, and its cost."""
    choices = product(_shards(facts), _zeros(facts), _schedules(facts), _sequences(facts), _rings(facts))
    costed = [(round(sum(cost for cost, _ in choice), 6), choice) for choice in choices]
    for cost, choice in sorted(costed, key=lambda pair: pair[0]):
        changed: dict[str, Any] = {}
        for _, keys in choice:
            changed |= keys
        yield cost, replace(facts, **changed)


_Choice = tuple[float, dict[str, Any]]


def _shards(facts: Facts) -> list[_Choice]:
    """As asked; else the divisor of the data ranks nearest to it."""
    asked: _Choice = (0.0, {})
    if shards_fit(facts):
        return [asked]
    assert facts.shard is not None
    wanted = facts.shard
    near = min((d for d in range(1, facts.data + 1) if facts.data % d == 0), key=lambda d: (abs(d - wanted), d))
    return [asked, (0.2, {"shard": near})]


def _zeros(facts: Facts) -> list[_Choice]:
    # Of two as near, the one that shards less.
    return [(0.3 * abs(z - facts.zero) + 0.05 * (z > facts.zero), {"zero": z}) for z in range(4)]


def _schedules(facts: Facts) -> list[_Choice]:
    if facts.pipeline == 1:
        return [(0.0, {})]
    asked = SCHEDULES[facts.schedule].placement
    choices: list[_Choice] = [(0.0, {})]
    for name, schedule in SCHEDULES.items():
        cost = 0.0 if name == facts.schedule else 0.4 if schedule.placement == asked else 0.6
        counts = {"single": {1}, "v": {2}, "loop": {1, 2, facts.stages}}[schedule.placement]
        choices += [
            (cost + 0.2 * abs(n - facts.stages), {"schedule": name, "stages": n})
            for n in sorted(counts)
            if (name, n) != (facts.schedule, facts.stages)
        ]
    return choices


def _sequences(facts: Facts) -> list[_Choice]:
    if facts.tensor == 1 or not facts.sequence:
        return [(0.0, {})]
    return [(0.0, {}), (0.3, {"sequence": False})]


def _rings(facts: Facts) -> list[_Choice]:
    if facts.context == 1 or not facts.ring:
        return [(0.0, {})]
    return [(0.0, {}), (0.3, {"ring": False})]
