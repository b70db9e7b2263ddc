"""What `shardwright verify` found, for a reader: a few lines of text, or one self-contained HTML page.

Beside report.py; train/compare.py holds the figures, page.py gives the look.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from shardwright import __version__
from shardwright.config import ConfigError
from shardwright.log import duration
from shardwright.planner.page import build_page, table, tiles
from shardwright.train.compare import KINDS, Kind, Pair, Report, StepReport, TensorReport
from shardwright.train.writing import writing

TENSORS_SHOWN = 50
EXCESSES_SHOWN = 8


def as_text(report: Report) -> str:
    """The report as lines for a terminal."""
    bounds = report.bounds
    lines = [_heading(report)]
    for step in report.steps:
        lines += _step_lines(report, step)
    lines.append(
        f"bounds: loss {bounds.loss:g}, gradient norm {bounds.grad_norm:g}, gradient {bounds.gradient:g} of its "
        f"norm times the root of the step, weight {bounds.weight:g} of how far it has moved"
    )
    lines += _remarks(report)
    excesses = report.excesses()
    lines += [f"out of bound: {excess}" for excess in excesses[:EXCESSES_SHOWN]]
    if len(excesses) > EXCESSES_SHOWN:
        lines.append(f"out of bound: {len(excesses) - EXCESSES_SHOWN} more")
    lines.append(f"{'passed' if report.passed else 'FAILED'}: {report.verdict()}")
    return "\n".join(lines)


def _heading(report: Report) -> str:
    processes = f" on {report.processes} processes" if report.processes > 1 else ""
    return (
        f"{report.layout}{processes} in {report.number_format}, beside one process in {report.against}; "
        f"{report.device}, {duration(report.seconds)}"
    )


def _step_lines(report: Report, step: StepReport) -> Iterator[str]:
    def numbers(pair: Pair) -> str:
        return f"{pair.spread:.8g} beside {pair.alone:.8g} ({pair.difference:.1e})"

    yield f"step {step.step}: loss {numbers(step.loss)}, gradient norm {numbers(step.grad_norm)}"
    worst = [(kind, step.worst(kind)) for kind in KINDS]
    yield f"        at most off: {', '.join(f'{k} {_number(w.relative)} ({w.name})' for k, w in worst)}"


def _remarks(report: Report) -> Iterator[str]:
    """What a reader should know beside the figures."""
    if report.repeat is not None:
        yield f"a second run of the layout changed {report.repeat or 'no bit'}"
    if report.retries:
        yield f"the loss scale fell {report.retries} times: passes that overflowed in fp16 were taken again"
    yield from (f"warning: {warning}" for warning in report.warnings)


def write_page(report: Report, output: str | Path) -> Path:
    """Write the page of a report and return its path."""
    place = Path(output)
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            fresh.write_text(build(report), encoding="utf-8")
            return fresh.replace(place)
        finally:
            fresh.unlink(missing_ok=True)


def check_place(output: Path) -> None:
    """ConfigError, before the work is done, where no page can be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output={output}: {error.strerror or error}; choose another place") from None
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        what = "is a folder; name a file in it" if output.is_dir() else "its folder takes no files; choose another"
        raise ConfigError(f"--output={output}: {what}")


def build(report: Report) -> str:
    """The page as text."""
    word = "Passed" if report.passed else "Failed"
    tensors = report.tensors()
    shown = f"Tensors, the {TENSORS_SHOWN} worst of {len(tensors)}" if len(tensors) > TENSORS_SHOWN else "Tensors"
    about = [["Layout", report.layout], *_facts(report), *([["Remark", remark] for remark in _remarks(report)])]
    excesses = [[str(excess)] for excess in report.excesses()[:TENSORS_SHOWN]]
    body = [
        '<header><p class="kicker">shardwright verify</p>'
        f"<h1>{word}: {html.escape(report.layout)}</h1><p>{html.escape(report.verdict())}</p></header>",
        tiles(_tiles(report)),
        f"<section><h2>Out of bound</h2>{table([], excesses)}</section>" if excesses else "",
        f"<section><h2>Steps</h2>{table(STEP_HEADS, [_step_row(report, step) for step in report.steps])}</section>",
        f"<section><h2>{shown}</h2>"
        f"{table(TENSOR_HEADS, [_tensor_row(row) for row in tensors[:TENSORS_SHOWN]])}</section>",
        f"<section><h2>What was run</h2>{table([], about)}</section>",
        _config(report),
        f"<footer>shardwright {__version__}. Differences of losses and norms are relative. Those of a tensor are "
        "2-norms: of the difference over that of the gradient, or over how far the weight has moved. A weight without "
        "a figure has a gradient of rounding alone, of which Adam makes what it likes.</footer>",
    ]
    return build_page(f"verify {report.layout} · shardwright", body, [])


STEP_HEADS = ("Step", "Loss beside one process", "Gradient norm beside one process", "Worst gradient", "Worst weight")
TENSOR_HEADS = ("Tensor", "Gradient off", "Weight off", "Largest element", "Share of the bound")


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    bounds = report.bounds
    loss = max(step.loss.difference for step in report.steps)
    norm = max(step.grad_norm.difference for step in report.steps)
    rows: list[tuple[str, float | None, float, str]] = [
        ("Loss", loss, bounds.loss, "relative"),
        ("Gradient norm", norm, bounds.grad_norm, "relative"),
    ]
    measures: dict[Kind, str] = {"gradient": "of its norm", "weight": "of how far it has moved"}
    for kind, measure in measures.items():
        worst = max((step.worst(kind) for step in report.steps), key=lambda figure: figure.share)
        rows.append((f"Worst {kind}", worst.relative, worst.bound, f"{measure}; {worst.name}"))
    return [(name, _number(value), f"bound {bound:g} {remark}") for name, value, bound, remark in rows]


def _step_row(report: Report, step: StepReport) -> list[str]:
    cells = [f"step {step.step}"]
    for pair, bound in ((step.loss, report.bounds.loss), (step.grad_norm, report.bounds.grad_norm)):
        cells.append(f"{pair.spread:.8g} beside {pair.alone:.8g}: {_marked(pair.difference, bound)}")
    for kind in KINDS:
        worst = step.worst(kind)
        cells.append(f"{_marked(worst.relative, worst.bound)} {worst.name}")
    return cells


def _tensor_row(row: TensorReport) -> list[str]:
    return [
        row.name,
        _marked(row.gradient.relative, row.gradient.bound),
        _marked(row.weight.relative, row.weight.bound),
        _number(row.weight.largest),
        f"{row.share:.1%}",
    ]


def _facts(report: Report) -> list[list[str]]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [
        ["Processes", str(report.processes)],
        ["Number format", f"{report.number_format}, beside {report.against}"],
        ["Device", report.device],
        ["Versions", versions],
        ["Took", duration(report.seconds)],
    ]


def _config(report: Report) -> str:
    text = html.escape(yaml.safe_dump(dict(report.config), sort_keys=False, allow_unicode=True))
    return f'<details><summary>Config</summary><div class="scroll"><pre>{text}</pre></div></details>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _marked(value: float | None, bound: float) -> str:
    """A difference, with a sign where it is out of its bound."""
    return f"{_number(value)}{'' if value is None or value <= bound else ' ✗'}"
