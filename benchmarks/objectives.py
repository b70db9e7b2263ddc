"""Tokens a second that one worker makes batches of, by objective: reading, checking and corrupting, in line.

The bundled English text, prepared with words and sentences marked. Tokens are those of the text that is used up, not of
the rows made of it. The aim is a million a second.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, Spread, facts_table, machine, parser, publish, say, table

AIM = 1e6
LENGTH = 512
ROWS = 32  # of a micro-batch
SPECIALS = {"mask": 9000, "cls": 9001, "sep": 9002, "pad": 9003, "bos": 9004}
SPECIALS |= {"first_sentinel": 9199, "last_sentinel": 9010}

KINDS: dict[str, dict[str, Any]] = {
    "causal": {"name": "causal"},
    "masked": {"name": "masked"},
    "masked, whole words, n-grams": {"name": "masked", "whole_words": True, "ngrams": 3},
    "masked, sentence order": {"name": "masked", "sentence": "order"},
    "masked, next sentence, 4 pairs": {"name": "masked", "sentence": "next", "pairs": 4},
    "replaced": {"name": "replaced"},
    "permuted": {"name": "permuted"},
    **{f"span, {kind}": {"name": "span", "kind": kind} for kind in
       ("spans", "replace", "drop", "bert", "mass", "deshuffle", "prefix")},
    "denoise, permute and infill": {"name": "denoise"},
    "denoise, delete": {"name": "denoise", "damage": ["delete"]},
    "denoise, rotate": {"name": "denoise", "damage": ["rotate"]},
    "pairs": {"name": "pairs"},
    "classify": {"name": "classify", "of": "tokens"},
}  # fmt: skip


def main() -> int:
    """Each objective in turn, in rounds; write the page."""
    p = parser(__doc__, "objectives.md")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    options = p.parse_args()
    if options.smoke:
        options.rounds, options.seconds, options.out = 1, 0.2, None
    data, examples = prepared(), written()
    rates: dict[str, list[float]] = {name: [] for name in KINDS}
    for number in range(options.rounds):
        for name, config in KINDS.items():
            rates[name].append(measure(config, data, examples, options.seconds))
        say(f"round {number + 1}: " + ", ".join(f"{name} {r[-1] / 1e6:.2f}" for name, r in rates.items()))
    spreads = {name: Spread.of(values) for name, values in rates.items()}
    slowest = min(spreads, key=lambda name: spreads[name].median)
    rows = [(name, *(f"{value / 1e6:.2f}" for value in spread)) for name, spread in spreads.items()]
    parts = [
        facts_table({**machine(), "rounds": str(options.rounds), "a turn": f"{options.seconds:g} s"}),
        f"Rows of {LENGTH} tokens (of the encoder where there are two), {ROWS} a micro-batch; one process, no threads.",
        table(["Million tokens a second", "Median", "Least", "Most"], rows),
        f"Aim: at least 1 for each. The slowest is *{slowest}*.",
    ]
    figures = {
        "tokens_per_s": {name: spread.median for name, spread in spreads.items()},
        "slowest_over_aim": spreads[slowest].median / AIM,
    }
    publish(options.out, "Batches of every objective", parts, figures)
    return 0


def prepared() -> Path:
    """data/english-starts, prepared first where it is missing."""
    folder = ROOT / "data" / "english-starts"
    if not (folder / "manifest.json").is_file():
        say(f"preparing {folder.relative_to(ROOT)}")
        command = ["prepare", "bundled:english", "--output", str(folder), "tokenizer.vocab_size=8192", "starts=true"]
        subprocess.run([sys.executable, "-m", "shardwright", *command], cwd=ROOT, check=True)
    return folder


def written() -> Path:
    """data/english-pairs: neighbouring stretches of the same text as sources and targets."""
    import numpy as np

    from shardwright.data.examples import write_examples
    from shardwright.data.manifest import Manifest
    from shardwright.data.stream import ValidationStream
    from shardwright.data.tokenizers import load_prepared

    folder = ROOT / "data" / "english-pairs"
    if (folder / "manifest.json").is_file():
        return folder
    manifest = Manifest.load(prepared())
    stream = ValidationStream([manifest.root], raw_length=800, stride=800, split="train")

    def rows() -> Iterator[tuple[list[int], list[int]]]:
        for number in range(stream.num_sequences - 1):
            text = stream.sequences(np.array([number])).tokens[0].tolist()
            yield text[:400], text[400:]

    write_examples(folder, {"train": rows(), "validation": []}, load_prepared(manifest))
    return folder


def measure(raw: dict[str, Any], data: Path, examples: Path, seconds: float) -> float:
    """Tokens a second over some steps, the first of which, that opens the shards, does not count."""
    from shardwright.data.examples import ExampleStream
    from shardwright.data.loader import Loader
    from shardwright.data.manifest import Manifest
    from shardwright.data.order import Plan
    from shardwright.data.stream import Stream, Wanted
    from shardwright.objective.setting import Setting
    from shardwright.objective.table import OBJECTIVES

    config, kind = OBJECTIVES[raw["name"]]
    end = Manifest.load(data).tokenizer["end_of_document"]
    objective = kind(config.model_validate(raw), Setting(LENGTH, vocab_size=8192, specials={**SPECIALS, "end": end}))
    stream: Any
    if objective.supervised:
        stream, taken = ExampleStream([str(examples)], raw_length=LENGTH, seed=0), 800
    else:
        taken, wanted = objective.stride(LENGTH), Wanted(objective.marks, objective.neighbours)
        stream = Stream([str(data)], raw_length=objective.raw_length(LENGTH), stride=taken, seed=0, wanted=wanted)
    with Loader(stream, Plan(ROWS * 4, ROWS), objective) as loader:
        for _ in range(4):
            next(loader)
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            next(loader)
            steps += 1
        return steps * ROWS * 4 * taken / (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
