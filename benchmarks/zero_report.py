"""The page of zero.py: memory by rank, bytes, time and traffic beside DeepSpeed, as tables and figures."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Spread, facts_table, machine, publish, say, table
from benchmarks.zero_contenders import CHECKED, MICRO_BATCHES, Job, config_of
from shardwright.estimate.memory import step_memory, zero_paper_bytes
from shardwright.estimate.share import Layout, Work
from shardwright.model.count import num_parameters
from shardwright.parallel.precision import FORMATS

STAGES = (1, 2, 3)
PEERS, WIDE = ("deepspeed", "deepspeed-small"), "deepspeed-wide"
STATES = ("masters", "optimizer", "gathered", "gradients", "buffers")
CATEGORIES = (*STATES, "activations", "logits")
AGREES = {"fp32": 1e-5, "bf16": 1e-3}  # relative differences of losses; DeepSpeed rounds its bf16 masters at the start
TITLES = {"deepspeed": "DeepSpeed", "deepspeed-small": "DeepSpeed, small", WIDE: "DeepSpeed, float32 sums"}


def names_of(part: str) -> list[tuple[str, int]]:
    """(contender, stage) of a point."""
    if part == "sums":
        return [(who, stage) for stage in STAGES[:2] for who in ("ours", WIDE)]
    return [(who, stage) for stage in STAGES for who in ("ours", *PEERS)] + [("ours", 0)] * (part == "memory")


def write_page(points: Sequence[dict[str, Any]], job: Job, path: Path | None) -> int:
    """The page of these points and the last line; 1 where losses differ."""
    parameters = num_parameters(config_of(job, 0).model)["total"]  # type: ignore[arg-type]
    memory = [row for point in points if point["part"] == "memory" for row in memory_rows(point, parameters)]
    bytes_beside = [row for point in points if point["part"] == "memory" for row in bytes_rows(point)]
    sent = [row for point in points if point["part"] == "traffic" for row in traffic_rows(point, parameters)]
    times = [row for point in points if point["part"] == "time" for row in time_rows(point, STAGES, PEERS)]
    sums = [row for point in points if point["part"] == "sums" for row in time_rows(point, STAGES[:2], (WIDE,))]
    apart = [row for point in points for row in losses(point)]
    wrong = [row for row in apart if not row["difference"] <= AGREES[row["precision"]]]
    facts = {**machine(), "DeepSpeed": importlib.metadata.version("deepspeed")}
    facts |= {key: ", ".join(sorted({p["facts"][key] for p in points})) for key in ("date", "commit")}
    loads = [float(p["facts"]["load before"]) for p in points if p["part"] == "time"] or [0.0]
    facts |= {"load before": f"{min(loads):.1f} to {max(loads):.1f} (of the times)"}
    facts |= {"threads": "1 a process", "ran beside": ", ".join(sorted({p["beside"] for p in points} - {""})) or "-"}
    parts = [introduction(job, parameters), facts_table(facts)]
    if memory:
        parts += ["## Memory by rank", MEMORY_WORDS, memory_table(memory)]
    if bytes_beside:
        parts += ["## Bytes beside DeepSpeed", BYTES_WORDS, bytes_table(bytes_beside)]
    if times:
        parts += ["## Time beside DeepSpeed", time_words(job), time_table(times, PEERS)]
    if sums:
        parts += [SUMS_WORDS, time_table(sums, (WIDE,))]
    if sent:
        parts += ["## What a step sends", TRAFFIC_WORDS, traffic_table(sent)]
    if times:
        parts += [COLLECTIVE_WORDS, collective_table([p for p in points if p["part"] == "time"])]
    parts += [loss_words(apart, wrong), FINDINGS]
    figures = {
        "benchmark": "zero", **facts, "parameters": parameters,
        "formula_over_measured": spread_of([row["formula_over_measured"] for row in memory]),
        "bytes_over_deepspeed": {name_of(row): row["ratio"] for row in bytes_beside},
        "time_over_deepspeed": {name_of(row): row["ratio"]._asdict() for row in times},
        "time_over_deepspeed_with_float32_sums": {name_of(row): row["ratio"]._asdict() for row in sums},
        "largest_loss_difference": max((row["difference"] for row in apart), default=None),
        "memory": memory,
    }  # fmt: skip
    publish(path, "Memory and time of ZeRO stages", parts, figures)
    for row in wrong:
        say(f"losses differ: {row}")
    return int(bool(wrong))


def name_of(row: Mapping[str, Any]) -> str:
    """Of a row in the figures."""
    return f"zero{row['stage']} x {row['processes']} {row['precision']}"


def spread_of(values: Sequence[float]) -> dict[str, float] | None:
    """Median and ends."""
    return Spread.of(values)._asdict() if values else None


FINDINGS = """\
## What the differences are (of the run of 2026-11-22)

*Bytes.* Ours held less than DeepSpeed at every stage, in either of its settings. Already between steps DeepSpeed holds
more: 14 bytes a parameter against 6 at stage 1, 10.6 against 6 at stage 3 (float32, 2 processes, 2.9 M parameters).

*Time.* Where one rank spent its processor in a step was sampled (`perf`, stage 1, float32, 2 processes; milliseconds,
ours against DeepSpeed's defaults): matrix products 266 and 268, torch's other kernels 131 and 131, interpreter 48 and
28, system 49 and 36. The same is computed; ours is slower at stages 1 and 2 by what does not grow with it:

- FSDP2's hooks run in Python for each wrapped module and micro-batch. The difference is 0.7 ms each time, with 7
  modules and 4 micro-batches here. A walk through all modules that this project added to each micro-batch is gone.
- FSDP2 gathers and reduces block by block, DeepSpeed in buckets, so that ours waits for more collectives; and gloo's
  reduce-scatter takes longer here than its all-reduce, though it has half to move.
- In bf16 at stage 2, DeepSpeed's default sends half the bytes; where it sums in float32 as well, ours is as fast.

The first two are fixed costs of a block and a micro-batch: 0.8 M parameters and 256 tokens here. Several small blocks
in one wrapped group would need fewer hooks and calls, and larger buffers; that is not done."""


def introduction(job: Job, parameters: int) -> str:
    """What was measured."""
    return (
        f"GPT-2 with {job.layers} layers, width {job.width} and {job.vocab_size:,} tokens of vocabulary: "
        f"{parameters / 1e6:.2f} M parameters. A step is {MICRO_BATCHES} micro-batches of {job.batch} x "
        f"{job.length} random tokens on each rank; clipping at 1.0, gradients accumulated in float32, AdamW by "
        "torch's fused kernel, without compilation, for both. Processes of one thread, gloo over the loopback device, "
        "freed memory kept (by glibc settings, for both). `benchmarks/zero.py` says more."
    )


# -------------------------------------------------------------------------------------------------- memory

MEMORY_WORDS = """\
Peak bytes of live tensors in a rank's second step, in MiB by rank; then the categories of the fullest rank at that
peak, in bytes a parameter. *Gathered*: copies in the compute format; *buffers*: what collectives send and receive;
*formula*: `shardwright/estimate/memory.py` for the whole, and over what was measured; *states*: the sum of the first
five; *paper*: what Rajbhandari et al. 2020 count for those (parameters and gradients in the compute format, no copies,
no buffers). Above it stand gradients that are summed up in float32, what is gathered beside the shards, and buffers."""


def memory_rows(point: Mapping[str, Any], parameters: int) -> list[dict[str, Any]]:
    """Ours by stage, at one number of processes in one format."""
    rows = []
    for stage in (0, *STAGES):
        ranks = [rank[f"ours/{stage}"] for rank in point["ranks"]]
        peaks = [rank["peak"] for rank in ranks]
        fullest = ranks[peaks.index(max(peaks))]
        value = FORMATS[point["precision"]].itemsize
        parts = {name: fullest["parts"].get(name, 0) for name in CATEGORIES}
        paper = zero_paper_bytes(stage, point["processes"], value)
        expected = formula(Job(**point["job"]), stage, point["processes"])
        rows.append({
            "processes": point["processes"], "precision": point["precision"], "stage": stage,
            "peak_by_rank": peaks,
            "bytes_a_parameter": {name: size / parameters for name, size in parts.items()},
            "states": sum(parts[name] for name in STATES) / parameters, "paper": paper,
            "formula": expected, "formula_over_measured": expected / max(peaks),
        })  # fmt: skip
    return rows


def formula(job: Job, stage: int, processes: int) -> int:
    """Bytes of a rank as estimated."""
    config = config_of(job, stage)
    work = Work(
        length=job.length,
        micro_batch=job.batch,
        micro_batches=MICRO_BATCHES,
        value_bytes=FORMATS[job.precision].itemsize,
    )
    layout = Layout.of(config.parallel, processes)
    return step_memory(config.model, work, optimizer="adamw", layout=layout)["total"]  # type: ignore[arg-type]


def memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a stage."""
    header = (
        "", "processes", "format", "by rank, MiB", "formula, MiB", "formula / measured", *CATEGORIES, "states", "paper"
    )  # fmt: skip
    return table(
        header,
        [
            [
                "replicated" if row["stage"] == 0 else f"ZeRO {row['stage']}", row["processes"], row["precision"],
                " ".join(map(mib, row["peak_by_rank"])), mib(row["formula"]), f"{row['formula_over_measured']:.3f}",
                *(f"{row['bytes_a_parameter'][name]:.2f}" for name in CATEGORIES),
                f"{row['states']:.2f}", f"{row['paper']:g}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def mib(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:.1f}"


BYTES_WORDS = """\
Peak bytes of live tensors in the second step, MiB, the fullest rank's. *DeepSpeed*: its defaults, but for buckets of
the whole model (its own of 500 million elements are allocated in full, 2 GB). *Small*: buckets of one block, nothing
gathered ahead or kept for longer, no parameter exempted: the least memory that its settings give. *Ratio*: ours over
the lesser of the two."""


def bytes_rows(point: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Peaks of all contenders by stage."""
    rows = []
    for stage in STAGES:
        most = {who: max(rank[f"{who}/{stage}"]["peak"] for rank in point["ranks"]) for who in ("ours", *PEERS)}
        least = min(most[who] for who in PEERS)
        rows.append({**place(point, stage), **most, "ratio": most["ours"] / least})
    return rows


def place(point: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """What a row is of."""
    return {"processes": point["processes"], "precision": point["precision"], "stage": stage}


def bytes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a stage."""
    header = ("", "processes", "format", "ours", *(TITLES[who] for who in PEERS), "ratio")
    return table(
        header,
        [
            [f"ZeRO {row['stage']}", row["processes"], row["precision"], *(mib(row[who]) for who in ("ours", *PEERS)),
             f"{row['ratio']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- time


def time_words(job: Job) -> str:
    """How time was taken."""
    return (
        f"Milliseconds a step, median of {job.rounds} rounds (least to greatest) of {job.steps} steps each, "
        "all contenders in the same processes, one after the other in each round. *Ratio*: ours over DeepSpeed's in "
        "the same round, median (least to greatest), for the faster of its two settings; under 1 ours is faster. "
        "*Busy*: processor time of rank 0, ours over that one's, without what it waits for others."
    )


def time_rows(point: Mapping[str, Any], stages: Sequence[int], peers: Sequence[str]) -> list[dict[str, Any]]:
    """Times by stage: the slowest rank's of each round."""
    rows = []
    for stage in stages:
        seconds = {
            who: [max(given) for given in zip(*(r[f"{who}/{stage}"]["seconds"] for r in point["ranks"]), strict=True)]
            for who in ("ours", *peers)
        }
        best = min(peers, key=lambda who: statistics.median(seconds[who]))
        busy = {who: statistics.median(point["ranks"][0][f"{who}/{stage}"]["busy"]) for who in ("ours", best)}
        rows.append({
            **place(point, stage), **{who: Spread.of(values) for who, values in seconds.items()}, "best": best,
            "ratio": Spread.of(a / b for a, b in zip(seconds["ours"], seconds[best], strict=True)),
            "busy": busy["ours"] / busy[best],
        })  # fmt: skip
    return rows


def time_table(rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> str:
    """A line a stage."""
    header = ("", "processes", "format", "ours", *(TITLES[who] for who in peers), "ratio", "busy")
    return table(
        header,
        [
            [f"ZeRO {row['stage']}", row["processes"], row["precision"], *(ms(row[who]) for who in ("ours", *peers)),
             f"{row['ratio'].median:.2f} ({row['ratio'].low:.2f} to {row['ratio'].high:.2f})", f"{row['busy']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip


SUMS_WORDS = """\
In bf16, DeepSpeed by default sends gradients as they are; ours sends them in float32, twice the bytes, so that sums
over ranks are as exact as those over micro-batches. Beside a DeepSpeed with `communication_data_type: fp32`:"""

TRAFFIC_WORDS = """\
Bytes of whole tensors in the collectives of one step of a rank, over the parameters, and in how many calls. An
all-reduce moves twice what a reduce-scatter of the same bytes does. DeepSpeed's defaults at stage 3 do not shard
parameters under 100,000 elements, here those of attention, and let go of the others late: it sends less and holds
more."""


def traffic_rows(point: Mapping[str, Any], parameters: int) -> list[dict[str, Any]]:
    """Bytes a parameter and calls by stage, contender and collective."""
    rows = []
    for stage in STAGES:
        row: dict[str, Any] = place(point, stage)
        for who in ("ours", *PEERS):
            sent = point["ranks"][0][f"{who}/{stage}"]["sent"]
            row[who] = {name: (calls, size / parameters) for name, (calls, size) in sent.items()}
        rows.append(row)
    return rows


def traffic_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a stage."""

    def cell(sent: Mapping[str, tuple[int, float]]) -> str:
        large = {name: amount for name, amount in sorted(sent.items()) if amount[1] > 0.01}
        return ", ".join(f"{name} {size:.1f} in {calls}" for name, (calls, size) in large.items())

    header = ("", "processes", "format", "ours", *(TITLES[who] for who in PEERS))
    return table(
        header,
        [
            [f"ZeRO {r['stage']}", r["processes"], r["precision"], *(cell(r[who]) for who in ("ours", *PEERS))]
            for r in rows
        ],
    )


COLLECTIVE_WORDS = """\
The collectives themselves, each called alone between barriers on the float32 gradients of one block, in milliseconds
(median of 20; the least over the formats)."""


def collective_table(points: Sequence[Mapping[str, Any]]) -> str:
    """A line a number of processes."""
    found: dict[int, list[dict[str, float]]] = {}
    for point in points:
        found.setdefault(point["processes"], []).append(point["ranks"][0]["collectives"])
    names = list(points[0]["ranks"][0]["collectives"])
    rows = [[n, *(f"{1e3 * min(each[name] for each in given):.2f}" for name in names)] for n, given in found.items()]
    return table(("processes", *names), rows)


def ms(spread: Spread) -> str:
    """Median and ends, in milliseconds."""
    return f"{1e3 * spread.median:.0f} ({1e3 * spread.low:.0f} to {1e3 * spread.high:.0f})"


# -------------------------------------------------------------------------------------------------- losses


def losses(point: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The largest relative difference between DeepSpeed's loss and ours over the first steps, by stage."""
    rows = []
    for who, stage in names_of(point["part"]):
        if who != "ours":
            ours = point["ranks"][0][f"ours/{stage}"]["losses"]
            ranks = [rank[f"{who}/{stage}"]["losses"] for rank in point["ranks"]]
            theirs = [statistics.mean(step) for step in zip(*ranks, strict=True)]  # each rank has that of its own part
            apart = max(abs(a - b) / a for a, b in zip(ours, theirs, strict=True))
            rows.append({**place(point, stage), "who": who, "difference": apart})
    return rows


def loss_words(rows: Sequence[Mapping[str, Any]], wrong: Sequence[Mapping[str, Any]]) -> str:
    """That all do the same work."""
    worst = {form: max((r["difference"] for r in rows if r["precision"] == form), default=None) for form in AGREES}
    told = ", ".join(f"{value:.1e} in {form}" for form, value in worst.items() if value is not None)
    text = f"Losses of the first {CHECKED} steps agree between ours and DeepSpeed to {told} (relative)."
    return text + (f" **{len(wrong)} of them are out of bounds.**" if wrong else "")
