"""`shardwright report`: the curves and the facts of one run, or of several laid over each other, as one HTML page.

`runs` reads the folders, `page` gives the look; here stands which curves are shown and how.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from shardwright import __version__
from shardwright.config import ConfigError, RunError
from shardwright.log import quantity
from shardwright.planner.page import Chart, Style, Trace, axis_switch, build_page, figures, legend, table, tiles
from shardwright.planner.runs import Record, Run, differences, key_figures, load_run, summary

AXES = {"step": "Steps", "tokens": "Tokens"}
POINTS = 1500  # most points of a curve in the page; extremes survive the thinning
NOISY = 100  # records from which on a curve is drawn smoothed, over its faint self


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of one or several run folders and return its path.

    Default output: `report.html` in the run folder; for several runs in the working folder. ConfigError names a folder
    that is no run, or an output that is a folder; RunError where the page cannot be written.
    """
    folders = [Path(runs)] if isinstance(runs, (str, Path)) else [Path(run) for run in runs]
    if not folders:
        raise ConfigError("report: name at least one run folder")
    loaded = [load_run(folder) for folder in folders]
    names = [run.name for run in loaded]
    told_apart = [
        run if names.count(run.name) == 1 else replace(run, name=str(folder))
        for run, folder in zip(loaded, folders, strict=True)
    ]
    place = Path(output) if output else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if place.is_dir():
        raise ConfigError(f"{place}: is a folder; name the file, as in --output {place / 'report.html'}")
    _write(place, build_report(told_apart))
    return place


def _write(place: Path, text: str) -> None:
    """Write the file whole or not at all."""
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(place)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise RunError(f"{place}: cannot be written: {error.strerror}; name another with --output") from None


def build_report(runs: Sequence[Run]) -> str:
    """The page as text."""
    charts = list(build_charts(runs))
    names = [run.name for run in runs]
    many = len(runs) > 1
    heads = ["", *names] if many else []
    changed = differences(runs)
    title = " · ".join(names)
    body = [
        '<header><p class="kicker">shardwright run report</p>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(_subtitle(runs))}</p></header>",
        table(heads, _figures_side_by_side(runs), coloured=True, roomy=True) if many else tiles(key_figures(runs[0])),
        f'<div class="bar">{_legend(runs, charts)}{axis_switch(AXES)}</div>' if charts else "",
        figures(charts) if charts else "<p>No step has been logged yet.</p>",
        f"<section><h2>What differs</h2>{table(heads, changed, coloured=True)}</section>" if changed else "",
        f"<section><h2>Summary</h2>{table(heads, summary(runs), coloured=many)}</section>",
        *(_config(run, f"Config of {run.name}" if many else "Config") for run in runs if run.config),
        f"<footer>shardwright {__version__}. Bits per byte count the UTF-8 bytes of the validation text. Throughput is "
        "that of all devices together. Dotted lines are where the run was resumed.</footer>",
    ]
    return build_page(f"{title} · shardwright", body, charts, AXES)


Value = str | Callable[[Record], float | None]


@dataclass(frozen=True)
class Panel:
    """A chart of one field (or function) of the records; `options` are those of Chart."""

    title: str
    note: str
    value: Value
    look: Style = "line"
    smoothed: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def _waiting(record: Record) -> float | None:
    data, step = record.get("data_s"), record.get("step_s")
    return data / step if data is not None and step else None


def _scale_in_use(record: Record) -> float | None:
    return record.get("loss_scale") if record.get("loss_scale") != 1 else None


PANELS = (
    Panel("Validation", "Bits per byte of its text", "val_bits_per_byte", "points", False, {"ticks": "~g"}),
    Panel("Throughput", "Tokens a second", "tokens_per_s", options={"from_zero": True, "hover": ".4~s"}),
    Panel("MFU", "", "mfu", options={"from_zero": True, "ticks": "~p", "hover": ".1%"}),
    Panel("Learning rate", "As the schedule gave it", "lr", smoothed=False, options={"ticks": "~g"}),
    Panel("Gradient norm", "Before clipping", "grad_norm", options={"ticks": "~g", "logarithmic": True}),
    Panel("Loss scale", "Of fp16; falls at an overflow", _scale_in_use, smoothed=False, options={"logarithmic": True}),
    Panel("Waiting for data", "Share of a step", _waiting, options={"from_zero": True, "ticks": "~p", "hover": ".2%"}),
)


def build_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """The charts that these runs have data for."""
    many = len(runs) > 1
    marks = {} if many else _resumes(runs[0])
    losses = [trace for n, run in enumerate(runs) for trace in _loss(run, n, many)]
    if losses:
        shown = _range_after_the_first_drop(runs)
        note = "Cross-entropy in nats a token" + ("; double-click shows the first steps whole" if shown else "")
        yield Chart("Loss", note, losses, ticks="~g", wide=True, marks=marks, shown=shown)
    for panel in PANELS:
        validation = panel.look == "points" and not many  # in the colour that it has in the chart of losses
        traces = [t for n, run in enumerate(runs) for t in _curves(run, panel, 1 if validation else n)]
        if traces:
            yield Chart(panel.title, panel.note or _denominator(runs), traces, marks=marks, **panel.options)


def _loss(run: Run, colour: int, many: bool) -> Iterator[Trace]:
    prefix = f"{run.name} " if many else ""
    found = run.column("loss")
    yield from _smoothed(f"{prefix}training", [r for r, _ in found], [v for _, v in found], colour)
    validation = run.column("val_loss")
    if validation:
        own = colour if many else 1
        yield _trace(f"{prefix}validation", [r for r, _ in validation], [v for _, v in validation], own, "points")
    lost = [record for record in run.records if record.get("nonfinite")]
    if lost and found:
        yield _trace(f"{prefix}not finite", lost, [min(v for _, v in found)] * len(lost), colour, "alert")


def _curves(run: Run, panel: Panel, colour: int) -> Iterator[Trace]:
    value = panel.value
    if isinstance(value, str):
        pairs = run.column(value)
    else:
        pairs = [(record, v) for record in run.records if (v := value(record)) is not None]
    records, values = [r for r, _ in pairs], [v for _, v in pairs]
    if panel.smoothed:
        yield from _smoothed(run.name, records, values, colour)
    elif pairs:
        yield _trace(run.name, records, values, colour, panel.look)


def _smoothed(name: str, records: Sequence[Record], values: Sequence[float], colour: int) -> Iterator[Trace]:
    """A long curve as its mean over its own faint self; a short one as it is."""
    if len(values) >= NOISY:
        yield _trace(f"{name}, each record", records, values, colour, "faint")
        values = smooth(values)
    if values:
        yield _trace(name, records, values, colour, "line")


def _trace(name: str, records: Sequence[Record], values: Sequence[float], colour: int, look: Style) -> Trace:
    kept = thin(values, POINTS)
    x = {axis: [records[i].get(axis) for i in kept] for axis in AXES}
    return Trace(name, x, [float(f"{values[i]:.6g}") for i in kept], colour, look)


def thin(values: Sequence[float], limit: int) -> list[int]:
    """Indices of at most about `limit` values that keep the ends, and the lowest and highest of every stretch."""
    if len(values) <= limit:
        return list(range(len(values)))
    num_stretches = limit // 2
    kept = {0, len(values) - 1}
    for n in range(num_stretches):
        stretch = range(n * len(values) // num_stretches, (n + 1) * len(values) // num_stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean: narrow where the curve is young and steep, a thirtieth of its length wide later."""
    sums = [0.0, *accumulate(values)]
    last, widest = len(values) - 1, max(len(values) // 60, 1)
    means = []
    for i in range(len(values)):
        half = min(widest, i // 4, max(last - i, widest // 4))
        low, high = i - half, min(i + half, last) + 1
        means.append((sums[high] - sums[low]) / (high - low))
    return means


def _range_after_the_first_drop(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Loss axis without the first fiftieth of the run, where that takes up much of it; None shows everything."""
    curves = [[v for _, v in run.column("loss")] for run in runs]
    curves = [c for c in curves if c]
    if not curves or min(map(len, curves)) < NOISY:
        return None
    low = min(map(min, curves))
    high = max(max(c[len(c) // 50 :]) for c in curves)
    whole = max(map(max, curves))
    return (low - 0.04 * (high - low), high) if high - low < 0.8 * (whole - low) else None


def _figures_side_by_side(runs: Sequence[Run]) -> list[list[str]]:
    found = [{label: value for label, value, _ in key_figures(run)} for run in runs]
    labels = dict.fromkeys(label for figures_ in found for label in figures_)
    return [[label, *(figures_.get(label, "–") for figures_ in found)] for label in labels]


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs, one over the other"
    parameters = runs[0].fact("parameters")
    words = [
        runs[0].setting("model.family"),
        f"{quantity(parameters)} parameters" if parameters else None,
        runs[0].fact("device"),
    ]
    return " · ".join(filter(None, words))


def _denominator(runs: Sequence[Run]) -> str:
    found = next((str(words) for run in runs if (words := run.fact("mfu_basis"))), "")
    return found.removeprefix("MFU: ") or "Model FLOPs over the peak of the devices"


def _legend(runs: Sequence[Run], charts: Sequence[Chart]) -> str:
    if len(runs) > 1:
        return legend([(run.name, n, "line") for n, run in enumerate(runs)])
    return legend([(t.name, t.colour, t.style) for chart in charts if chart.title == "Loss" for t in chart.traces])


def _resumes(run: Run) -> dict[str, list[float]]:
    """Where later starts went on from, on every axis."""
    steps = sorted({start["step"] for start in run.starts if start.get("step")})
    tokens = {record["step"]: record.get("tokens") for record in run.records}
    return {"step": list(steps), "tokens": [t for step in steps if (t := tokens.get(step)) is not None]}


def _config(run: Run, title: str) -> str:
    text = html.escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    return f'<details><summary>{html.escape(title)}</summary><div class="scroll"><pre>{text}</pre></div></details>'
