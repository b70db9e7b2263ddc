"""Tokens a second of the loader against its peers, what it costs a real run, and how long a seek takes.

1. Loader: batches of 8 x 512, shuffled, ready for the model, from the same random tokens: this project's loader
   (packed with document numbers and positions, every checksum compared; and plain) against litdata, webdataset's own
   pipeline (a sample a sequence, and over this project's shards), mosaicml-streaming and a raw memory map; in process,
   and through one worker. Processes take turns.
2. Training: data_s as a share of step_s in a real run, read in process, on one thread, by one worker.
3. Seek: opening a corpus of 10,000 shards and getting the first batch at some place of it, each in a fresh process.

Corpora are made once, in --corpus (about 12 bytes a token). Example: python benchmarks/stream.py --tokens 100000000
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import (
    HERE,
    ROOT,
    Contender,
    Spread,
    english,
    facts_table,
    machine,
    parser,
    peer_versions,
    peers_python,
    publish,
    say,
    table,
    take_turns,
)
from stream_contenders import CONTENDERS
from stream_corpus import build_corpus, build_many_shards

PACKAGES = ("litdata", "webdataset", "mosaicml-streaming", "torch")
OURS = ("ours", "ours-plain")
MODES = {"0": "in process", "thread": "one thread", "1": "one worker process"}
PARTS = ("loader", "training", "seek")


def main() -> None:
    """Measure, write the page, print the figures."""
    options = arguments()
    facts = machine()
    figures: dict[str, Any] = {"benchmark": "stream", **facts}
    versions = {f"peers' {name}": version for name, version in peer_versions(PACKAGES).items()}
    parts = [facts_table({**facts, **versions})]
    for name in options.parts:
        found, page = {"loader": loader, "training": training, "seek": seek}[name](options)
        figures[name] = found
        parts.append(page)
    publish(None if options.smoke else options.out, "The loader", parts, figures)


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "stream.md")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders of the loader")
    p.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the synthetic corpus")
    p.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    p.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    p.add_argument("--corpus", type=Path, default=ROOT / "data" / "bench-stream", help="folder of the corpora")
    p.add_argument("--train-steps", type=int, default=12, help="steps of each real run")
    p.add_argument("--train-rounds", type=int, default=2, help="real runs of each kind of reading")
    p.add_argument("--shards", type=int, default=10_000, help="shards of the corpus that is sought in")
    p.add_argument("--seeks", type=int, default=10, help="places sought")
    options = p.parse_args()
    if options.smoke:
        options.tokens, options.rounds, options.seconds, options.shards, options.seeks = 2_000_000, 2, 0.2, 50, 2
        options.train_steps, options.train_rounds = 4, 1
        options.corpus = options.corpus.with_name("bench-stream-smoke")
    return options


# ------------------------------------------------------------------------------------------------ loader


def loader(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Tokens a second of every contender in every mode."""
    build_corpus(options.corpus, options.tokens, options.only)
    with ExitStack() as stack:
        turns = []
        for mode in MODES:
            for name in options.only:
                if mode == "thread" and name not in OURS:
                    continue
                contender = start(name, mode, options.corpus)
                stack.callback(contender.close)
                turns.append((contender, {"seconds": options.seconds}))
        answers = take_turns(turns, options.rounds)
    rates = {name: Spread.of(a["tokens_per_s"] for a in given) for name, given in answers.items()}
    return loader_figures(rates), "## Tokens a second\n\n" + loader_table(options, rates) + LOADER_WORDS


def start(name: str, mode: str, folder: Path) -> Contender:
    """The process of one contender in one mode."""
    ours = name in OURS or name == "memory-map"
    python = sys.executable if ours else peers_python()
    return Contender(f"{name} {mode}", [python, HERE / "stream_contenders.py", name, mode, folder])


def loader_table(options: argparse.Namespace, rates: dict[str, Spread]) -> str:
    """A line a contender, a column a mode; millions of tokens a second."""

    def cell(name: str, mode: str) -> str:
        rate = rates.get(f"{name} {mode}")
        return f"{rate.median / 1e6:.2f} ({rate.low / 1e6:.2f} to {rate.high / 1e6:.2f})" if rate else ""

    rows = [[name, *(cell(name, mode) for mode in MODES)] for name in options.only]
    return table(("million tokens/s: median (least to most)", *MODES.values()), rows)


LOADER_WORDS = """

*ours* gives document numbers, restarting positions and weights with each batch, and compares the checksum of every
document it reads; *ours-plain* leaves the document numbers and positions out; the others give inputs and labels alone
and check nothing. *memory-map* is random rows of one file: the ceiling. *webdataset* has a sample a sequence;
*webdataset-our-shards* reads this project's tars, whose members hold about 1 MiB. mosaicml-streaming ran with an empty
module in place of torchvision, which it imports for images and which does not load beside this torch."""


def loader_figures(rates: dict[str, Spread]) -> dict[str, Any]:
    """Medians, and the ratios of ours."""
    figures: dict[str, Any] = {"tokens_per_s": {name: rate._asdict() for name, rate in rates.items()}}
    for mode in ("0", "1"):
        ours = rates.get(f"ours {mode}")
        others = {name: rate.median for name, rate in rates.items() if name.endswith(f" {mode}")}
        if ours:
            ratios = {name.split()[0]: ours.median / rate for name, rate in others.items() if name.split()[0] != "ours"}
            figures[f"ours_over_{'in_process' if mode == '0' else 'worker'}"] = ratios
    return figures


# ---------------------------------------------------------------------------------------------- training


def training(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """data_s and step_s of real runs, one kind of reading after the other, in rounds."""
    data = english()
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for number in range(options.train_rounds):
        for mode in MODES:
            data_s, step_s = real_run(options, data, mode)
            found[mode].append((data_s, step_s))
            say(f"training {number + 1}: {MODES[mode]}: data_s {data_s * 1e3:.3f} ms of {step_s:.3f} s")
    figures: dict[str, dict[str, float]] = {}
    rows = []
    for mode, runs in found.items():
        waited, whole = (Spread.of(values).median for values in zip(*runs, strict=True))
        share = Spread.of(data_s / step_s for data_s, step_s in runs).median
        figures[mode] = {"data_s": waited, "step_s": whole, "data_share": share}
        rows.append([MODES[mode], f"{waited * 1e3:.3f}", f"{whole:.3f}", f"{share:.3%}"])
    best = min(figures, key=lambda mode: figures[mode]["step_s"])
    words = f"\n\nThe shortest step is that with {MODES[best]}; the aim is a share under 1 %."
    header = ("reading", "data_s, ms", "step_s, s", "share")
    return figures, "## In a real run\n\n" + table(header, rows) + words


def real_run(options: argparse.Namespace, data: Path, mode: str) -> tuple[float, float]:
    """Mean data_s and step_s of a run's later steps, in the shape of step.py."""
    shape = {"layers": 2, "width": 64, "heads": 4} if options.smoke else {"layers": 8, "width": 512, "heads": 8}
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "run": folder,
            "model": {"family": "gpt2", "max_length": 512, **shape},
            "objective": {"name": "causal"},
            "data": {"path": str(data), "sequence_length": 512, "workers": mode if mode == "thread" else int(mode)},
            "batch": {"sequences": 8, "micro": 8},
            "train": {"steps": options.train_steps},
            "precision": {"compute": "bf16"},
            "log": {"every": 1, "tensorboard": False},
            "evaluate": {"batch": 8},
        }
        path = Path(folder) / "stream.yaml"
        path.write_text(json.dumps(config), "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "shardwright", "train", str(path)], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"stream: the real run failed:\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if "data_s" in line][options.train_steps // 3 :]  # the first ones compile
    return sum(s["data_s"] for s in steps) / len(steps), sum(s["step_s"] for s in steps) / len(steps)


# -------------------------------------------------------------------------------------------------- seek


SEEK = """
import json, sys, time
import numpy, torch, shardwright.data.loader as loader, shardwright.data.stream as stream
from shardwright.data.order import Plan
from shardwright.objective.causal import Causal, CausalConfig
from shardwright.objective.setting import Setting
folder, drawn = sys.argv[1], int(sys.argv[2])
begin = time.perf_counter()
opened = stream.Stream([folder], raw_length=513, stride=512, seed=0)
plan = Plan(global_batch=8, micro_batch=8)
with loader.Loader(opened, plan, Causal(CausalConfig(), Setting(512)), workers="thread") as batches:
    first = next(batches.start(drawn // 8, drawn))
    print(json.dumps(time.perf_counter() - begin))
"""


def seek(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Seconds from nothing open to the first batch, at random places of a corpus of many shards."""
    folder = options.corpus.with_name(options.corpus.name + "-many")
    build_many_shards(folder, options.shards)
    sequences = options.shards * (1 << 20) // 512
    places = random.Random(0).sample(range(2 * sequences), options.seeks)  # of the first two epochs
    times = []
    for drawn in places:
        done = subprocess.run(
            [sys.executable, "-c", SEEK, str(folder), str(drawn)], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"stream: the seek failed:\n{done.stderr[-2000:]}")
        times.append(float(done.stdout))
        say(f"seek to sequence {drawn:,}: {times[-1]:.3f} s")
    spread = Spread.of(times)
    words = (
        f"## Seek\n\nFrom a process that has opened nothing to the first batch, at {options.seeks} random places of "
        f"{options.shards:,} shards ({options.shards * (1 << 20) / 1e9:.1f} billion tokens; real manifest and indexes, "
        f"the tars are holes): median {spread.median:.3f} s, most {spread.high:.3f} s; the aim is under 0.5 s. "
        "Importing torch is not counted."
    )
    return {"seconds": spread._asdict(), "shards": options.shards}, words


if __name__ == "__main__":
    main()
