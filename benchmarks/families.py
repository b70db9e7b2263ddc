"""Every family on real text: 300 steps in English and in Chinese, its loss beside the entropy of single tokens.

A model that learned no more than how often each token comes would be as good as the unigram entropy of the validation
tokens under the training split's frequencies: a family trains where its held-out loss a token falls well below it. Each
run is configs/debug/<family>.yaml with `train.steps=300`, on bundled text. One line a run in runs/families/points.jsonl
by revision, family and text, and not done again. Ends with 1 where one did not learn.

Examples: python benchmarks/families.py
          python benchmarks/families.py --only 'bert/*' --steps 100
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common import ROOT, add_line, facts_table, machine, parser, publish, read_lines, say, table
from kill import revision_of_tree

TEXTS = {"english": "bundled:english", "chinese": "bundled:chinese_poems"}
BELOW = 0.9  # of the unigram entropy: a loss above it is no learning
PATIENCE_S = 1800.0
Line = dict[str, Any]


def main() -> int:
    """Run what has no line yet, write the page; 1 where a family learned nothing."""
    options = arguments()
    log, revision = options.runs / "points.jsonl", revision_of_tree()
    done = {(line["revision"], line["name"], line["steps"]) for line in read_lines(log)}
    for name in options.names:
        if not options.page and (revision, name, options.steps) not in done:
            add_line(log, {"revision": revision, "name": name, "steps": options.steps, **measure(name, options)})
    lines = newest(read_lines(log), options)
    write_page(lines, options)
    return int(any(line["loss"] > BELOW * line["entropy"] for line in lines))


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "families.md")
    p.add_argument("--steps", type=int, default=300, help="of each run")
    p.add_argument("--only", default="*", help="pattern of family/text")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "families", help="where runs and prepared text lie")
    p.add_argument("--page", action="store_true", help="write the page of what was measured, and nothing else")
    options = p.parse_args()
    if options.smoke:
        options.steps, options.runs = 10, options.runs.with_name("families-smoke")
        options.out, options.only = None, "gpt2/english"
    configs = sorted(path.stem for path in (ROOT / "configs" / "debug").glob("*.yaml"))
    every = [f"{family}/{text}" for family in configs for text in TEXTS]
    options.names = [name for name in every if fnmatch.fnmatch(name, options.only)]
    if not options.names:
        sys.exit(f"families: --only {options.only}: fits none of {', '.join(every)}")
    return options


def measure(name: str, options: argparse.Namespace) -> Line:
    """One run to its end: validation loss a token, entropy, seconds."""
    family, text = name.split("/")
    data, run = prepared(text, options.runs), options.runs / name.replace("/", "-")
    overrides = [f"run={run}", f"data.path={data}", f"train.steps={options.steps}", "log.every=50"]
    subprocess.run(["rm", "-rf", str(run)], check=True)
    begin = time.monotonic()
    shardwright("train", f"configs/debug/{family}.yaml", *overrides, log=run.with_suffix(".log"))
    seconds = time.monotonic() - begin
    last = [line for line in read_lines(run / "metrics.jsonl") if "val_loss" in line][-1]
    losses = {key: value for key, value in last.items() if key.startswith("val_loss")}
    # Of several terms the first is that of tokens; the total mixes kinds.
    loss = next((value for key, value in losses.items() if key != "val_loss"), losses["val_loss"])
    found = {"loss": loss, "losses": losses, "entropy": entropy(data), "seconds": seconds}
    say(f"{name}: {loss:.3f} of {found['entropy']:.3f} nats a token after {options.steps} steps, {seconds:.0f} s")
    return found


def shardwright(*command: str, log: Path) -> None:
    """Run a command of the project; ends this script where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "shardwright", *command],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            timeout=PATIENCE_S,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    if done.returncode:
        sys.exit(f"families: {command[0]} ended with {done.returncode}:\n{log.read_text('utf-8')[-2000:]}")


@cache
def prepared(text: str, runs: Path) -> Path:
    """The text's shards with a WordPiece vocabulary, where sentences and words start indexed too."""
    folder = runs / "data" / text
    if not (folder / "manifest.json").is_file():
        say(f"preparing {text}")
        settings = ["tokenizer.train=wordpiece", "tokenizer.vocab_size=8192", "starts=true"]
        shardwright("prepare", TEXTS[text], "--output", str(folder), *settings, log=folder.with_suffix(".log"))
    return folder


@cache
def entropy(folder: Path) -> float:
    """Nats a validation token under the training split's frequencies, one added to each count."""
    import numpy as np

    from shardwright.data.manifest import Manifest
    from shardwright.data.shards import Shard

    manifest = Manifest.load(str(folder))

    def counts(split: str) -> np.ndarray:
        size = int(manifest.tokenizer["vocab_size"])
        total = np.zeros(size)
        for info in manifest.split(split).shards:
            shard = Shard(f"{manifest.root}/{info.path}", f"{manifest.root}/{info.index}")
            total += np.bincount(shard.tokens(0, shard.num_tokens), minlength=size)
        return total

    train, held = counts("train") + 1, counts("validation")
    return float(-(held * np.log(train / train.sum())).sum() / held.sum())


def newest(lines: Sequence[Line], options: argparse.Namespace) -> list[Line]:
    """The last line of each run of so many steps, in the order of names."""
    found = {line["name"]: line for line in lines if line["steps"] == options.steps}
    return [found[name] for name in options.names if name in found]


def write_page(lines: Sequence[Line], options: argparse.Namespace) -> None:
    """One row a run."""
    rows = [
        [
            line["name"],
            f"{line['loss']:.3f}",
            f"{line['entropy']:.3f}",
            f"{line['loss'] / line['entropy']:.0%}",
            ", ".join(f"{k.removeprefix('val_loss_')} {v:.3f}" for k, v in line["losses"].items() if k != "val_loss"),
            f"{line['seconds']:.0f}",
            line["revision"],
        ]
        for line in lines
    ]
    head = (
        f"{options.steps} steps of configs/debug/<family>.yaml on bundled text, 8,192 WordPiece tokens. *Loss*: "
        "held-out nats a predicted token (of the first term, where there are several); *entropy*: what the frequencies "
        "of single tokens in the training split need for the validation split."
    )
    header = ("family/text", "loss", "entropy", "of it", "terms", "seconds", "commit")
    parts = [head, facts_table(machine()), table(header, rows)]
    figures = {line["name"]: line["loss"] / line["entropy"] for line in lines}
    publish(options.out, "Every family learns", parts, {"of_entropy": figures})


if __name__ == "__main__":
    sys.exit(main())
