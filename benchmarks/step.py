"""Tokens a second of one training step, this project's against those of its peers, side by side in one run.

The same GPT-2 shape for all (--shape), bf16 autocast with float32 masters and float32 beside it, AdamW, clipping 1.0:
  ours, ours-masked           this project's step; with document masks and restarting positions
  trainer, trainer-compiled   Hugging Face's GPT-2 under transformers.Trainer; with torch_compile
  accelerate, ...-compiled    the same model in an Accelerate loop; with its dynamo backend
  litgpt, litgpt-compiled     LitGPT's model in this shape and the step of its pretrain; as it comes, compiled
Each is a process of its own that stays alive; they take turns of a few steps, so that whatever the machine does
meanwhile meets all of them. In each round the GEMM peak is measured as well: the ceiling of the share that is given.

Example: python benchmarks/step.py --rounds 7 --steps 5
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    HERE,
    Answers,
    Contender,
    Failed,
    Spread,
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
from step_contenders import CONTENDERS, Job, Shape

SHAPES = {
    "small": Shape(vocab_size=8192, layers=8, width=512, heads=8, length=512, batch=8),
    "124m": Shape(vocab_size=50304, layers=12, width=768, heads=12, length=1024, batch=16),
    "tiny": Shape(vocab_size=512, layers=2, width=64, heads=4, length=64, batch=4),
}
OURS = ("ours", "ours-masked")
PEERS = tuple(name for name in CONTENDERS if name not in (*OURS, "products", "profile"))
# What an operation of the profile is, by a part of its name; the first that fits.
KINDS = {
    "attention": ("attention", "flash"),
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "linear_pointwise", "gemm", "cutlass", "nvjet"),
    "fused element-wise kernels": ("CompiledFxGraph", "triton"),
    "optimizer": ("adam",),
    "copies and conversions": ("copy_",),
}
PACKAGES = ("torch", "transformers", "accelerate", "litgpt", "lightning")
# What shardwright.parallel.mesh.keep_host_memory asks of glibc, as glibc's own variables.
KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
NUM_BATCHES, DOCUMENT = 16, 600  # batches of random tokens; mean length of a document in them


def main() -> None:
    """Measure, write the page, print the figures."""
    options = arguments()
    facts = machine(options.device)
    figures: dict[str, Any] = {"benchmark": "step", "shape": asdict(SHAPES[options.shape]), **facts}
    parts = [introduction(options), facts_table({**facts, **_peer_facts(options)})]
    for precision in options.precision:
        answers, known = measure(options, precision)
        found = summarise(answers, known, SHAPES[options.shape], options.only)
        figures[precision] = found["figures"]
        parts += [f"## {precision}", found["table"], found["words"]]
    if "ours" in options.only:
        say("profiling one step of ours")
        kinds, text = breakdown(options)
        figures["profile"] = kinds
        parts += [f"## Where our step's time goes ({options.precision[0]})", text]
    publish(None if options.smoke else options.out, "Tokens a second of one training step", parts, figures)


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "step.md")
    p.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    p.add_argument("--steps", type=int, default=5, help="steps of a turn, after one that does not count")
    p.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS], help="contenders")
    p.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"], help="formats")
    p.add_argument("--fp32-rounds", type=int, default=3, help="rounds of the slower float32")
    p.add_argument("--shape", choices=SHAPES, default="small", help="model and batch")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    p.add_argument("--threads", type=int, help="CPU threads of each contender (default: torch's own choice)")
    p.add_argument("--kept-memory", action="store_true", help="peers too keep freed memory, as ours does by itself")
    options = p.parse_args()
    if options.smoke:
        options.shape, options.rounds, options.fp32_rounds, options.steps = "tiny", 2, 1, 2
    return options


def measure(options: argparse.Namespace, precision: str) -> tuple[Answers, dict[str, dict]]:
    """Answers of every turn by contender, and what each said of itself."""
    rounds = options.fp32_rounds if precision == "fp32" else options.rounds
    with contenders(options, precision) as (products, *others):
        request: dict[str, Any] = {"warm": 1, "steps": options.steps}
        turns = [(products, {"seconds": 1.0}), *((contender, request) for contender in others)]
        return take_turns(turns, rounds), {contender.name: contender.facts for contender in others}


@contextmanager
def contenders(options: argparse.Namespace, precision: str) -> Iterator[list[Contender]]:
    """All processes, started and warmed up one after the other; the first is the one that measures products."""
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        job = Job(asdict(shape), precision, options.device, options.threads, *write_tokens(Path(folder), shape))
        started = []
        for name in ("products", *options.only):
            try:
                contender = start(name, job, KEPT_MEMORY if options.kept_memory and name in PEERS else {})
                stack.callback(contender.close)
                if name != "products":
                    warm = contender.ask(warm=0, steps=3)  # compiles, and brings memory to its size
                    say(f"{precision}: {name} is ready; its first three steps took {warm['seconds']:.1f} s")
            except Failed as failed:
                if name not in PEERS:
                    raise
                say(f"left out: {failed}")
                continue
            started.append(contender)
        yield started


def start(name: str, job: Job, variables: Mapping[str, str] | None = None) -> Contender:
    """A contender's process, in the environment that it needs."""
    python = peers_python() if name in PEERS else sys.executable
    return Contender(name, [python, HERE / "step_contenders.py", name, json.dumps(asdict(job))], variables)


def breakdown(options: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Share of each kind of operation in one step of ours under torch's profiler, and the table of them."""
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = write_tokens(Path(folder), shape)
        child = start("profile", Job(asdict(shape), options.precision[0], options.device, options.threads, *files))
        stack.callback(child.close)
        shares = dict(child.ask()["shares"])
    kinds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for name, share in shares.items():
        fitting = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
        kinds[next(fitting, "the rest")] += share
    rest = [name for name in shares if not any(part in name for parts in KINDS.values() for part in parts)]
    rows = [(kind, f"{share:.1%}") for kind, share in kinds.items()]
    return kinds, table(("", "share"), rows) + f"\n\nGreatest of the rest: {', '.join(rest[:6])}."


def write_tokens(folder: Path, shape: Shape) -> tuple[str, str]:
    """Random tokens int64 [N, B, T + 1] and where documents begin in them, the same for every contender."""
    rng = np.random.default_rng(0)
    size = (NUM_BATCHES, shape.batch, shape.length + 1)
    tokens, documents = folder / "tokens.npy", folder / "documents.npy"
    np.save(tokens, rng.integers(0, shape.vocab_size, size))
    np.save(documents, rng.random(size) < 1 / DOCUMENT)
    return str(tokens), str(documents)


# ----------------------------------------------------------------------------------------------- report


def summarise(answers: Answers, known: dict[str, dict], shape: Shape, wanted: list[str]) -> dict[str, Any]:
    """Table, words and figures of one number format."""
    steps = [name for name in answers if name != "products"]
    rates = {name: rate_of(answers[name], shape) for name in steps}
    square = Spread.of(a["square"] for a in answers["products"]).median
    own = Spread.of(a["own"] for a in answers["products"]).median
    flops = next((k["flops_per_token"] for k in known.values() if "flops_per_token" in k), None)
    peers = {name: rate.median for name, rate in rates.items() if name in PEERS}
    best = max(peers, key=lambda name: peers[name]) if peers else None
    rows = [row_of(name, rates, answers[name][-1], known[name], flops, square) for name in steps]
    figures = {
        "tokens_per_s": {name: rate._asdict() for name, rate in rates.items()},
        "gemm_peak_flops": square,
        "own_products_flops": own,
        "flops_per_token": flops,
    }
    if flops and "ours" in rates:
        figures["gemm_share"] = rates["ours"].median * flops / square
    if best and "ours" in rates:
        figures |= {"best_peer": best, "ratio_to_best_peer": rates["ours"].median / peers[best]}
    header = ("", "tokens/s", "least to most", "ours is", "of GEMM peak", "parameters", "peak GiB", "loss", "at step")
    return {"table": table(header, rows), "words": words(figures, wanted, square, own), "figures": figures}


def rate_of(turns: list[dict], shape: Shape) -> Spread:
    """Tokens a second over the turns."""
    tokens = shape.batch * shape.length
    return Spread.of(tokens * turn["steps"] / turn["seconds"] for turn in turns)


def row_of(
    name: str, rates: dict[str, Spread], last: dict, facts: dict, flops: float | None, square: float
) -> list[str]:
    """One contender's line."""
    rate = rates[name]
    ratio = f"{rates['ours'].median / rate.median:.2f} x" if "ours" in rates else ""
    share = f"{rate.median * flops / square:.0%}" if flops else ""
    spread = f"{rate.low:,.0f} to {rate.high:,.0f}"
    size, memory, loss = f"{facts['parameters'] / 1e6:.1f} M", f"{last['peak_gib']:.2f}", f"{last['loss']:.3f}"
    return [name, f"{rate.median:,.0f}", spread, ratio, share, size, memory, loss, last["steps_done"]]


def words(figures: dict[str, Any], wanted: list[str], square: float, own: float) -> str:
    """What the table says, in words."""
    missing = [name for name in wanted if name not in figures["tokens_per_s"]]
    lines = [f"Could not run here: {', '.join(missing)}."] if missing else []
    lines += [
        f"GEMM peak, best over square products, measured in every round (median): {square / 1e9:,.0f} GFLOP/s. "
        f"The products of this step in their own shapes, run alone: {own / 1e9:,.0f} GFLOP/s."
    ]
    if figures["flops_per_token"]:
        limit = square / figures["flops_per_token"]
        lines.append(
            f"A token costs {figures['flops_per_token'] / 1e6:.0f} MFLOP forward and backward (causal half of the "
            f"attention), so that this peak would be {limit:,.0f} tokens/s."
        )
    if "best_peer" in figures:
        ratio, share = figures["ratio_to_best_peer"], figures["gemm_share"]
        lines.append(
            f"Ours is {ratio:.2f} x the best of the peers ({figures['best_peer']}; the aim is 1.4 x) and reaches "
            f"{share:.0%} of the GEMM peak (the aim is 60 %)."
        )
    return "\n".join(lines)


def introduction(options: argparse.Namespace) -> str:
    """What was measured."""
    shape = SHAPES[options.shape]
    memory = (
        "Peers were given glibc settings by which freed memory is kept, as ours asks for by itself."
        if options.kept_memory
        else "Ours asks glibc to keep freed memory; `--kept-memory` gives peers the same."
    )
    return (
        f"GPT-2 with {shape.layers} layers, width {shape.width}, {shape.heads} heads and {shape.vocab_size:,} tokens "
        f"of vocabulary; batches of {shape.batch} x {shape.length} random tokens, the same for all; AdamW (torch's "
        "fused kernel for all), clipping at 1.0, no dropout, float32 masters. Every contender is a process that stays "
        "alive; they take turns (`benchmarks/step.py` says more). *Loss* is that of the last step: all of them learn "
        "the same 16 batches by heart. Peers are measured as they come and compiled; `ours is` gives ours over theirs. "
        + memory
    )


def _peer_facts(options: argparse.Namespace) -> dict[str, str]:
    if not set(options.only) & set(PEERS):
        return {}
    return {f"peers' {name}": version for name, version in peer_versions(PACKAGES).items()}


if __name__ == "__main__":
    main()
