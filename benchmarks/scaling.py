"""Weak and strong scaling of real training steps, by layout and number of processes.

Weak: --sequences a process and step, so that every process has the same work. Strong: --total sequences a step,
whatever the processes. A point is one world: its steps through the run's own data, passes and update, timed on all
ranks after a warm-up, then one under the profiler. Each is one JSON line in --points; what has its line is not measured
again.

Here, every point in a world of its own by torchrun:
    python benchmarks/scaling.py --processes 1 2 4 8
On a cluster, one point of the world that the launcher made (torchrun's variables, or srun's):
    srun python benchmarks/scaling.py --point --mode weak --layout zero3 --config llama --points /shared/points.jsonl
Of the points of any number of files, the page and the results (where rank 0 of a point appended them):
    python benchmarks/scaling.py --report /shared/points.jsonl --html scaling.html
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    HERE,
    ROOT,
    add_line,
    english,
    facts_table,
    machine,
    parser,
    peak_gib,
    publish,
    read_lines,
    say,
    table,
)
from kill import revision_of_tree

sys.path.insert(0, str(ROOT))

#: Layouts by name, as config keys; {n} is the number of processes. --layout name:key=value,... gives another.
LAYOUTS = {
    "data": "parallel.zero=0",
    "zero1": "parallel.zero=1",
    "zero2": "parallel.zero=2",
    "zero3": "parallel.zero=3",
    "tensor": "parallel.tensor={n}",
    "context": "parallel.context={n}",
    "pipeline": "parallel.pipeline={n}",
    "pipeline-zbv": "parallel.pipeline={n},parallel.schedule=zbv",
}
ONE = "one process"
MODES = ("weak", "strong")
#: A model that every layout of up to 8 processes can share out.
MODEL = ["model.layers=10", "model.width=128", "model.heads=8", "model.max_length=128", "data.sequence_length=128"]
SETTINGS = ["batch.micro=1", "train.compile=false", "train.steps=1000", "run=runs/scaling/run"]
#: What makes two points the same.
KEY = ("config", "set", "mode", "layout", "keys", "processes", "sequences", "threads", "timed", "commit")
PATIENCE = 600.0  # seconds that a point may take here
#: Names of the profiler's events that are communication.
TRAFFIC = ("gloo:", "nccl:", "c10d::", "_c10d_functional::")
#: What srun sets in place of torchrun's variables.
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def main() -> int:
    """One of the three uses."""
    options = arguments()
    if options.point:
        return point(options)
    if not options.report:
        run_points(options)
    points = read_points(options.report or [options.points])
    if not points:
        sys.exit("scaling: no points yet")
    write_pages(points, options)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "scaling.md")
    p.add_argument("--config", default="debug/gpt2", help="config of the run, by file or name")
    p.add_argument("--set", nargs="*", default=MODEL, metavar="KEY=VALUE", help="overrides of the config")
    p.add_argument("--layout", nargs="+", default=["data", "zero1", "zero3", "tensor", "context", "pipeline"],
                   help=f"of {', '.join(LAYOUTS)}; or name:key=value,key=value, {{n}} being the processes")  # fmt: skip
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--launcher", choices=["torchrun"], default="torchrun", help="starts the points here")
    p.add_argument("--sequences", type=int, default=8, help="of a process and step in weak scaling")
    p.add_argument("--total", type=int, default=32, help="of a step in strong scaling")
    p.add_argument("--steps", type=int, default=8, help="measured")
    p.add_argument("--warm", type=int, default=3, help="before them")
    p.add_argument("--threads", type=int, default=1, help="of a process here")
    p.add_argument("--points", type=Path, default=ROOT / "runs" / "scaling" / "points.jsonl", help="lines of results")
    p.add_argument("--point", "--from-environment", action="store_true",
                   help="measure the one point of this world, one layout and mode, and append it")  # fmt: skip
    p.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="measure nothing, report these points")
    p.add_argument("--html", type=Path, default=None, help="page with charts; default scaling.html beside the points")
    options = p.parse_args()
    if options.smoke:
        options.processes, options.layout, options.steps, options.warm = [1, 2], ["zero3", "tensor"], 2, 1
        options.sequences, options.total, options.points = 2, 4, options.points.with_name("smoke.jsonl")
        options.set = ["model.layers=2", "model.width=32"]
    if options.point and (len(options.layout) > 1 or len(options.mode) > 1):
        p.error("--point measures one --layout in one --mode")
    return options


def keys_of(layout: str, processes: int) -> tuple[str, list[str]]:
    """(name, config keys) of a layout as it is asked for."""
    name, found, given = layout.partition(":")
    if not found and name not in LAYOUTS:
        sys.exit(f"scaling: no layout {name!r}; one of {', '.join(LAYOUTS)}, or {name}:key=value,...")
    text = given if found else LAYOUTS[name]
    return (name, text.format(n=processes).split(",")) if processes > 1 else (ONE, [])


# ------------------------------------------------------------------------------------------- here, all points


def run_points(options: argparse.Namespace) -> None:
    """Every point that has no line yet, each in a world of its own."""
    if options.config == "debug/gpt2":
        english()
    done = {key_of(line) for line in read_points([options.points])}
    for processes in options.processes:
        layouts = options.layout if processes > 1 else options.layout[:1]
        for mode, layout in [(mode, layout) for mode in options.mode for layout in layouts]:
            name, keys = keys_of(layout, processes)
            wanted = {"config": options.config, "set": options.set, "mode": mode, "layout": name, "keys": keys,
                      "processes": processes, "sequences": sequences_of(mode, processes, options),
                      "threads": options.threads, "timed": options.steps, "commit": revision_of_tree()}  # fmt: skip
            if key_of(wanted) in done:
                continue
            say(f"{mode}, {name}, {processes} process{'es' if processes > 1 else ''}")
            launch(mode, layout, processes, options)


def launch(mode: str, layout: str, processes: int, options: argparse.Namespace) -> None:
    """One world; a layout that does not fit says so and is left out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(HERE / "scaling.py"), "--point", "--mode", mode, "--layout", layout, "--config", options.config]
    for key in ("sequences", "total", "steps", "warm", "points"):
        command += [f"--{key}", str(getattr(options, key))]
    command += ["--set", *options.set]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        text, _ = process.communicate()
        say(f"  gave up after {PATIENCE:.0f} s")
    if process.returncode:
        lines = [line for line in text.splitlines() if "scaling:" in line] or text.strip().splitlines()[-5:]
        say("  left out: " + "\n".join(dict.fromkeys(lines)))


def sequences_of(mode: str, processes: int, options: argparse.Namespace) -> int:
    """The global batch of a point."""
    return int(options.sequences * processes if mode == "weak" else options.total)


# ------------------------------------------------------------------------------------------- one point


def point(options: argparse.Namespace) -> int:
    """Measure the world that this process is in; rank 0 appends the line."""
    enter_slurm()
    from shardwright.config import ConfigError
    from shardwright.parallel.mesh import world_size
    from shardwright.train.settings import read_config

    processes, (mode,), (layout,) = world_size(), options.mode, options.layout
    name, keys = keys_of(layout, processes)
    sequences = sequences_of(mode, processes, options)
    threads = [f"train.threads={os.environ['OMP_NUM_THREADS']}"] if os.environ.get("OMP_NUM_THREADS") else []
    try:
        config = read_config(options.config, [*SETTINGS, *threads, *options.set, *keys, f"batch.sequences={sequences}"])
        figures = measure(config, options.warm, options.steps)
    except ConfigError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", 0)) == 0:
        line = {"benchmark": "scaling", "config": options.config, "set": options.set, "mode": mode, "layout": name,
                "keys": keys, "processes": processes, "sequences": sequences, "timed": options.steps,
                "threads": config.train.threads, **figures, **facts(processes)}  # fmt: skip
        add(line, options.points)
    return 0


def enter_slurm() -> None:
    """Under srun, which sets no variables of torch's, the same by SLURM's; rank 0's host is the first of the job."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    os.environ.update({name: os.environ[theirs] for name, theirs in SLURM.items()})
    if "MASTER_ADDR" not in os.environ:
        asked = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        os.environ["MASTER_ADDR"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def measure(config: Any, warm: int, steps: int) -> dict[str, Any]:
    """Times of steps, the slowest rank's of each, memory of the fullest rank, share of communication on rank 0."""
    import torch
    import torch.distributed as dist

    from shardwright.parallel.mesh import join_world, world_size
    from shardwright.parallel.proposals import check_layout
    from shardwright.train.build import build_corpus, build_loader, build_step, fit_to_corpus
    from shardwright.train.course import Course
    from shardwright.train.layout import build_facts

    fit_to_corpus(config, build_corpus(config))
    check_layout(build_facts(config, world_size()))
    with join_world(config.train.device, config.train.threads, config.parallel) as world:
        step = build_step(config, world)
        with build_loader(config, world, Course(config).ramp) as loader:
            loader.start()

            def one(number: int) -> float:
                begin = time.perf_counter()
                step.accumulate(next(loader).micro_batches, torch.full((), number, device=world.device))
                step.update(1.0).tolist()  # waits for the device
                return time.perf_counter() - begin

            for number in range(warm):
                one(number)
            seconds = []
            for number in range(warm, warm + steps):
                world.any(False)  # all begin together
                seconds.append(one(number))
            share = communication(lambda: one(warm + steps), world.device.type) if world.size > 1 else 0.0
        numbers = torch.tensor([*seconds, peak_gib()], dtype=torch.float64, device=world.device)
        if world.size > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        *slowest, memory = numbers.tolist()
        device, hosts = world.device.type, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    tokens = config.global_batch() * config.data.sequence_length
    median = statistics.median(slowest)
    return {
        "tokens": tokens, "tokens_per_s": tokens / median, "memory_gib": memory, "communication_share": share,
        "step_s": {"median": median, "low": min(slowest), "high": max(slowest), "steps": steps},
        "device": device, "hosts": hosts,
    }  # fmt: skip


def communication(run: Any, device: str) -> float:
    """Share of `run` in which this rank has a collective under way, waits for the others included."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        seconds = run()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.name.startswith(TRAFFIC) or event.name.startswith("ncclDevKernel")
    )
    return min(covered(spans) / 1e6 / seconds, 1.0)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of sorted spans."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def facts(processes: int) -> dict[str, Any]:
    """What a point was measured on."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return {
        "date": datetime.date.today().isoformat(), "commit": revision_of_tree(), "torch": torch.__version__,
        "host": socket.gethostname(), "cores_per_process": (os.cpu_count() or 1) / local,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def add(line: dict[str, Any], path: Path) -> None:
    """Append a point, with its efficiency where one process has been measured."""
    line["efficiency"] = efficiency(line, baselines(read_points([path]) + [line]))
    add_line(path, line)


# ------------------------------------------------------------------------------------------- reading points


def read_points(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Every line of these files; one that was cut off is left out."""
    return [line for path in paths for line in read_lines(path)]


def newest(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each point, whatever the commit."""
    return list({key_of({**point, "commit": ""}): point for point in points}.values())


def key_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes two points the same."""
    return tuple(json.dumps(line[name]) for name in KEY)


def work_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What a process of a point does that one process alone is compared with: of weak scaling its own share."""
    share = line["sequences"] / line["processes"] if line["mode"] == "weak" else line["sequences"]
    return (*(json.dumps(line[name]) for name in ("config", "set", "mode", "threads")), str(share))


def baselines(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], float]:
    """Tokens a second of one process, by the work it does; the newest."""
    return {work_of(p): p["tokens_per_s"] for p in points if p["processes"] == 1}


def efficiency(line: Mapping[str, Any], one: Mapping[tuple[str, ...], float]) -> float | None:
    """Tokens a second over as many times those of one process; None where that was not measured."""
    alone = one.get(work_of(line))
    return line["tokens_per_s"] / (line["processes"] * alone) if alone else None


# ------------------------------------------------------------------------------------------- pages


def write_pages(points: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The page with charts, the results file, the last line."""
    points = sorted(newest(points), key=lambda p: (p["config"], MODES.index(p["mode"]), p["layout"], p["processes"]))
    one = baselines(points)
    for line in points:
        line["efficiency"] = efficiency(line, one)
    html = options.html or (options.report[0] if options.report else options.points).with_name("scaling.html")
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(build_html(points), "utf-8")
    say(f"wrote {html}")
    found = {**machine(), "commit": ", ".join(sorted({p["commit"] for p in points}))}
    models = dict.fromkeys(f"`{p['config']}`: {' '.join(p['set']) or 'as it is'}" for p in points)
    parts = [introduction(points), "Configs: " + "; ".join(models) + ".", facts_table(found)]
    for mode in MODES:
        own = [p for p in points if p["mode"] == mode]
        if own:
            parts += [f"## {mode.capitalize()} scaling", rows(own)]
    best = {
        mode: max((p["efficiency"], p["layout"], p["processes"]) for p in points if p["mode"] == mode
                  and p["processes"] > 1 and p["efficiency"])
        for mode in MODES
        if any(p["mode"] == mode and p["processes"] > 1 and p["efficiency"] for p in points)
    }  # fmt: skip
    figures = {"benchmark": "scaling", "points": len(points), "best_efficiency": best}
    publish(None if options.smoke else options.out, "Weak and strong scaling", parts, figures)


def introduction(points: Sequence[Mapping[str, Any]]) -> str:
    """What the figures mean, and what they cannot."""
    text = (
        "Training steps of `benchmarks/scaling.py` (data, passes, update), by layout and processes. *Weak*: the same "
        "sequences for each process; *strong*: the same step for all. *Efficiency*: tokens a second over as many times "
        "those of one process. *Step*: the slowest rank of each step, median (least to greatest). *Communicating*: "
        "share of a profiled step in which rank 0 has a collective under way, waits for the others included. *Memory*: "
        "most that any rank held, of the GPU where there is one, else of the host with libraries."
    )
    fewest = min(p["cores_per_process"] for p in points)
    if any(p["device"] == "cpu" for p in points) and fewest < 1:
        cores = max(round(p["cores_per_process"] * p["processes"] / p["hosts"]) for p in points)
        most = max(p["processes"] for p in points)
        text += (
            f"\n\n**These figures show no scaling of compute beyond {cores} processes, and cannot.** The machine has "
            f"{cores} cores and each process one thread: 1 process leaves the rest idle, {cores} have a core each, "
            f"{most} share one between {round(1 / fewest)}. The best that n processes can reach is an efficiency "
            f"of {cores} / n: {cores / most:.2f} at {most}. How far a figure is below that is what the layout adds to "
            "the same arithmetic (communication through the loopback device, waiting for processes that have no core "
            "at the moment, smaller matrices), and whatever else ran on the machine (*load*: its load average at the "
            "end of the point). The libraries alone are about 0.35 GiB of *memory*. On a cluster the same script gives "
            "the same lines (see its head)."
        )
    return text


def rows(points: Sequence[Mapping[str, Any]]) -> str:
    """One row a point."""
    header = ("layout", "processes", "sequences", "tokens/s", "step, ms", "efficiency", "communicating", "GiB", "load")
    return table(header, [row(p) for p in points])


def row(p: Mapping[str, Any]) -> list[str]:
    """A point in words."""
    step = p["step_s"]
    return [
        p["layout"], str(p["processes"]), str(p["sequences"]), f"{p['tokens_per_s']:,.0f}",
        f"{1e3 * step['median']:.0f} ({1e3 * step['low']:.0f} to {1e3 * step['high']:.0f})",
        "" if p["efficiency"] is None else f"{p['efficiency']:.2f}", f"{p['communication_share']:.0%}",
        f"{p['memory_gib']:.2f}", f"{p['load']:g}",
    ]  # fmt: skip


def build_html(points: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained page: curves by layout, and every point in a table."""
    from shardwright import __version__
    from shardwright.planner import page

    layouts = [name for name in dict.fromkeys(p["layout"] for p in points) if name != ONE] or [ONE]
    charts = [chart for mode in MODES for chart in build_charts(points, mode, layouts)]
    subtitle = ", ".join(sorted({f"{p['config']} on {p['device']}" for p in points}))
    header = ["layout", "mode", "processes", "sequences", "tokens/s", "step, ms", "efficiency", "communicating", "GiB"]
    cells = [[p["layout"], p["mode"], *row(p)[1:-1]] for p in points]
    body = [
        f'<header><p class="kicker">shardwright scaling</p><h1>Weak and strong scaling</h1><p>{subtitle}</p></header>',
        f'<div class="bar">{page.legend([(name, n, "points") for n, name in enumerate(layouts)])}</div>',
        page.figures(charts),
        f"<section><h2>Every point</h2>{page.table(header, cells)}</section>",
        f"<footer>shardwright {__version__}. {introduction(points).translate(dict.fromkeys(map(ord, '*`')))}</footer>",
    ]
    return page.build_page("Scaling · shardwright", body, charts, {"processes": "Processes"})


def build_charts(points: Sequence[Mapping[str, Any]], mode: str, layouts: Sequence[str]) -> Iterator[Any]:
    """Throughput, efficiency and communication of one mode over the processes."""
    from shardwright.planner.page import Chart, Trace

    wanted = {
        "tokens_per_s": ("Throughput", "Tokens a second", {"hover": ".4~s"}),
        "efficiency": ("Efficiency", "Of as many times one process", {"ticks": "~p", "hover": ".0%"}),
        "communication_share": ("Communicating", "Share of a step, waits included", {"ticks": "~p", "hover": ".0%"}),
    }
    for field, (title, note, options) in wanted.items():
        traces = []
        for number, name in enumerate(layouts):
            own = sorted(
                (p["processes"], p[field])
                for p in points
                if p["mode"] == mode and p["layout"] in (name, ONE) and p[field] is not None
            )
            if own:
                x, y = zip(*own, strict=True)
                traces.append(Trace(name, {"processes": list(x)}, [float(f"{v:.5g}") for v in y], number, "points"))
        if traces:
            yield Chart(f"{title}, {mode} scaling", note, traces, from_zero=True, **options)


if __name__ == "__main__":
    sys.exit(main())
