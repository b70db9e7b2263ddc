"""The shell of this project's HTML pages: one file, one look, nothing fetched.

Charts are described as plain data (`Chart`, `Trace`) and drawn by a short script over plotly, which is inlined once;
colours come from the style sheet, so that a page follows the reader's light or dark scheme and prints in light. A
content security policy in the page forbids every request, so that "self-contained" is held by the browser as well.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

RUN_COLOURS = 6  # --run-0 .. --run-5 of the style sheet; more runs start over

Style = Literal["line", "faint", "points", "alert"]


@dataclass(frozen=True)
class Trace:
    """One curve. `x` holds the positions under each name of the page's axis switch; None in `y` is a gap."""

    name: str
    x: Mapping[str, Sequence[float | None]]
    y: Sequence[float | None]
    colour: int = 0
    style: Style = "line"


@dataclass(frozen=True)
class Chart:
    """One plot under a title.

    `ticks` and `hover` are d3 formats; `wide` spans the page; `shown` is the y range at first, `from_zero` starts it at
    zero; `marks` are vertical lines by axis.
    """

    title: str
    note: str
    traces: Sequence[Trace]
    ticks: str = "~s"
    hover: str = ".4~g"
    logarithmic: bool = False
    from_zero: bool = False
    wide: bool = False
    shown: tuple[float, float] | None = None
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)


def build_page(title: str, body: Sequence[str], charts: Sequence[Chart], axes: Mapping[str, str] | None = None) -> str:
    """A whole page: `body` blocks of HTML, then the charts. `axes` names the choices of the x axis: key -> title."""
    data = {"charts": [asdict(chart) for chart in charts], "axes": dict(axes or {})}
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>",
        *body,
        "</main>",
        f'<script type="application/json" id="data">{as_json(data)}</script>',
        f"{_library() if charts else ''}<script>{SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _library() -> str:
    """What draws charts: 4.8 MB, which a page of tables alone goes without."""
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def as_json(data: object) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def figures(charts: Sequence[Chart]) -> str:
    """The places where the charts are drawn, in their order."""
    return '<section class="charts">' + "".join(_figure(n, chart) for n, chart in enumerate(charts)) + "</section>"


def _figure(number: int, chart: Chart) -> str:
    note = f"<p>{html.escape(chart.note)}</p>" if chart.note else ""
    kind = ' class="wide"' if chart.wide else ""
    return (
        f"<figure{kind}><figcaption><h2>{html.escape(chart.title)}</h2>{note}</figcaption>"
        f'<div class="plot" id="chart-{number}" role="img" aria-label="{html.escape(chart.title)}"></div></figure>'
    )


def tiles(numbers: Sequence[tuple[str, str, str]]) -> str:
    """A row of key figures: (label, value, remark)."""
    cells = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd><small>{html.escape(remark)}</small></div>"
        for label, value, remark in numbers
    )
    return f'<dl class="tiles">{cells}</dl>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, coloured: bool = False, roomy: bool = False) -> str:
    """A table whose first column names the row.

    `coloured` marks the heads of the other columns with the runs' colours; `roomy` is for few large numbers.
    """

    def head(number: int, text: str) -> str:
        swatch = f'<i style="--colour: var(--run-{(number - 1) % RUN_COLOURS})"></i>' if coloured and number else ""
        return f'<th scope="col">{swatch}{html.escape(text)}</th>'

    top = "".join(head(n, text) for n, text in enumerate(header))
    texts = [[html.escape(cell) for cell in row] for row in rows]
    cells = [[f'<th scope="row">{name}</th>', *(f"<td>{cell}</td>" for cell in rest)] for name, *rest in texts]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    thead = f"<thead><tr>{top}</tr></thead>" if any(header) else ""
    return f'<div class="scroll{" roomy" * roomy}"><table>{thead}<tbody>{lines}</tbody></table></div>'


def legend(entries: Sequence[tuple[str, int, str]]) -> str:
    """What the curves' looks mean: (name, colour, style of Trace)."""
    items = "".join(
        f'<li class="{style}" style="--colour: var(--run-{colour % RUN_COLOURS})">{html.escape(name)}</li>'
        for name, colour, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def axis_switch(axes: Mapping[str, str]) -> str:
    """Buttons that choose the x axis; the first one is on."""
    on = next(iter(axes))
    buttons = "".join(
        f'<button type="button" data-axis="{key}" aria-pressed="{str(key == on).lower()}">{html.escape(text)}</button>'
        for key, text in axes.items()
    )
    return f'<div class="switch" role="group" aria-label="Horizontal axis">{buttons}</div>'


POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "base-uri 'none'; form-action 'none'"
)

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1f2328; --soft: #6b7078; --line: #e6e3de; --grid: #eeece8;
  --run-0: #2f6690; --run-1: #c8663a; --run-2: #4f8a5b; --run-3: #8a5a9e; --run-4: #b08a2e; --run-5: #3f8f95;
  --alert: #c0392b; }
@media (prefers-color-scheme: dark) { :root:not(.printing) {
  --paper: #15171a; --card: #1c1f23; --ink: #e7e5e1; --soft: #9a9fa6; --line: #2c3036; --grid: #282c31;
  --run-0: #7fb2dc; --run-1: #e8986f; --run-2: #8cc498; --run-3: #c39ad4; --run-4: #d9b866; --run-5: #7cc7cc;
  --alert: #ef7a6d; } }
:root.printing { color-scheme: light; --paper: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3rem) clamp(1rem, 4vw, 2.5rem) 4rem; }
header { margin-bottom: 1.75rem; }
header p { margin: 0; color: var(--soft); }
.kicker { font-size: .75rem; letter-spacing: .12em; text-transform: uppercase; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); font-weight: 600; letter-spacing: -.015em; line-height: 1.2;
  margin: .15rem 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: .95rem; font-weight: 600; margin: 0; }
section > h2, details > summary { font-size: 1.05rem; font-weight: 600; margin: 2.25rem 0 .75rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 0 0 2rem;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tiles > div { background: var(--card); padding: .9rem 1.1rem; min-width: 0; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.55rem; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tiles small { color: var(--soft); font-size: .78rem; display: block; overflow-wrap: anywhere; }
.bar { display: flex; flex-wrap: wrap; gap: .6rem 1.5rem; align-items: center; justify-content: space-between;
  margin: 0 0 .9rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; list-style: none; margin: 0; padding: 0;
  color: var(--soft); font-size: .85rem; }
.legend li::before { content: ""; display: inline-block; width: 1.4em; height: 0; border-top: 2.5px solid var(--colour);
  vertical-align: middle; margin-right: .5em; }
.legend li.faint::before { opacity: .35; }
.legend li.points::before { width: .55em; height: .55em; border: 0; border-radius: 50%; background: var(--colour); }
.legend li.alert::before { width: .5em; height: .5em; border: 0; background: var(--alert); transform: rotate(45deg); }
.switch { display: inline-flex; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.switch button { font: inherit; font-size: .82rem; padding: .25rem .8rem; border: 0; background: transparent;
  color: var(--soft); cursor: pointer; }
.switch button + button { border-left: 1px solid var(--line); }
.switch button[aria-pressed=true] { background: var(--card); color: var(--ink); font-weight: 600; }
.switch button:focus-visible, summary:focus-visible { outline: 2px solid var(--run-0); outline-offset: 1px; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0;
  padding: 1rem 1.1rem .4rem; }
figure.wide, figure.wide:first-child ~ figure:last-child:nth-child(even) { grid-column: 1 / -1; }
figcaption p { margin: .05rem 0 0; color: var(--soft); font-size: .82rem; line-height: 1.4; }
.plot { height: 260px; }
.wide .plot { height: 360px; }
@media (max-width: 800px) { .charts { grid-template-columns: minmax(0, 1fr); }
  .plot { height: 230px; } .wide .plot { height: 270px; } figure { padding: .9rem .8rem .3rem; } }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem 1.1rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th, tbody tr:first-child > * { border-top: 0; }
thead + tbody tr:first-child > * { border-top: 1px solid var(--line); }
th[scope=row] { font-weight: 400; color: var(--soft); white-space: nowrap; width: 1%; }
th[scope=col] { font-weight: 600; overflow-wrap: anywhere; }
th i { display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .5em;
  background: var(--colour); }
td { overflow-wrap: anywhere; min-width: 11rem; }
.roomy { margin-bottom: 2rem; }
.roomy td { font-size: 1.15rem; font-weight: 600; }
details summary { cursor: pointer; }
pre { margin: 0; padding: 1rem 1.1rem; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .8rem; }
@page { margin: 14mm; }
:root.printing body { font-size: 11px; }
:root.printing main { width: 182mm; max-width: none; padding: 0; margin: 0; }
:root.printing .switch { display: none; }
:root.printing .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .7rem; }
:root.printing .plot { height: 46mm; }
:root.printing .wide .plot { height: 64mm; }
:root.printing .tiles { grid-template-columns: repeat(3, 1fr); }
:root.printing .scroll { overflow: visible; }
:root.printing pre { white-space: pre-wrap; columns: 2; font-size: 9px; }
figure, .tiles, tr { break-inside: avoid; }
@media print { body { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement;
  const { charts, axes } = JSON.parse(document.getElementById("data").textContent);
  let axis = Object.keys(axes)[0] ?? "x";
  const css = name => getComputedStyle(root).getPropertyValue(name).trim();
  const LOOKS = {
    line: c => ({ mode: "lines", line: { color: c, width: 2 } }),
    faint: c => ({ mode: "lines", line: { color: c, width: 1 }, opacity: 0.3, hoverinfo: "skip" }),
    points: c => ({ mode: "lines+markers", line: { color: c, width: 1.5 }, marker: { color: c, size: 6 } }),
    alert: () => ({ mode: "markers", marker: { color: css("--alert"), size: 8, symbol: "diamond" } }),
  };
  const traceOf = (chart, t) => {
    const look = LOOKS[t.style](css(`--run-${t.colour % COLOURS}`));
    return { type: "scatter", name: t.name, x: t.x[axis] ?? Object.values(t.x)[0], y: t.y, connectgaps: false,
      hovertemplate: look.hoverinfo ? undefined : `%{y:${chart.hover}}`, ...look };
  };
  const layoutOf = (chart, place) => {
    const soft = css("--soft"), grid = css("--grid"), line = css("--line");
    const marks = (chart.marks[axis] ?? []).map(x => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
      layer: "below", line: { color: soft, width: 1, dash: "dot" } }));
    const base = { gridcolor: grid, zeroline: false, linecolor: line, automargin: true, fixedrange: coarse() };
    return { height: place.clientHeight, width: place.clientWidth, margin: { l: 8, r: 10, t: 10, b: 8 },
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", showlegend: false, shapes: marks,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft },
      hovermode: "x unified", dragmode: coarse() ? false : "zoom",
      hoverlabel: { bgcolor: css("--card"), bordercolor: line, font: { color: css("--ink"), size: 12 } },
      xaxis: { ...base, range: [0, 1.01 * end()], nticks: 8, tickformat: "~s", hoverformat: ",", showgrid: false,
        showline: true, title: { text: axes[axis] ?? "", standoff: 8, font: { size: 12 } } },
      yaxis: { ...base, tickformat: chart.ticks, nticks: 6,
        rangemode: chart.from_zero ? "tozero" : "normal", ...(chart.logarithmic ? logarithmic(chart) : {}),
        ...(chart.shown ? { range: chart.shown } : {}) } };
  };
  const logarithmic = chart => {  // linear under one decade, then ticks at 1-2-5, over two at powers of ten
    const values = chart.traces.flatMap(t => t.y).filter(v => v > 0);
    if (!values.length) return {};
    const decades = Math.log10(values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b)));
    return decades < 1 ? {} : { type: "log", dtick: decades < 2 ? "D2" : Math.ceil(decades / 6) };
  };
  const end = () => charts.flatMap(chart => chart.traces).flatMap(t => t.x[axis] ?? [])
    .reduce((a, b) => Math.max(a, b), 0);
  const coarse = () => matchMedia("(pointer: coarse)").matches;
  const draw = () => charts.forEach((chart, n) => {
    const place = document.getElementById(`chart-${n}`);
    Plotly.react(place, chart.traces.map(t => traceOf(chart, t)), layoutOf(chart, place), { displayModeBar: false });
  });
  const print = on => { root.classList.toggle("printing", on); draw(); };
  document.querySelectorAll("[data-axis]").forEach(button => button.addEventListener("click", () => {
    axis = button.dataset.axis;
    document.querySelectorAll("[data-axis]").forEach(b => b.setAttribute("aria-pressed", String(b === button)));
    draw();
  }));
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  draw();
})();
""".replace("COLOURS", str(RUN_COLOURS))
