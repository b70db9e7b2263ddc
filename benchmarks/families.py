"""Every family on real text: 300 steps in English and in Chinese, its loss beside the entropy of single tokens.

A model that learned no more than how often each token comes would be as good as the unigram entropy: of the tokens that
it predicts in validation, under the frequencies of those that it predicts in training. A family trains where its
held-out loss is at most nine tenths of that. Sentinels and their like, which are easy, count for nothing: what they
cost is charged to the text's tokens.

Runs are those of configs/debug/<family>.yaml, with pairs of sentences and sentence permutation where the papers have
them, on bundled text with a byte-level BPE of each language; the Transformer's are on pairs where the corpora folder is
there, and its language is that of the targets. One line a run in runs/families/points.jsonl by revision, family and
text, and not done again. Ends with 1 where one did not learn.

Examples: python benchmarks/families.py
          python benchmarks/families.py --only 'bert/*' --steps 100
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, add_line, facts_table, machine, parser, publish, read_lines, say, table
from kill import revision_of_tree

BELOW = 0.9  # of the unigram entropy: a loss above it is no learning
PATIENCE_S = 1800.0
COUNTED = 4096  # sequences whose targets are counted for the frequencies
TEXTS = {"english": "bundled:english", "chinese": "bundled:chinese_poems"}
VOCABULARY = 300  # tokens: so few that 300 steps see each of them, and its neighbours, often enough
#: Fields of translate-en-zh that are read and predicted, by the language of the latter.
PAIRS = {"english": ("target", "source"), "chinese": ("source", "target")}
#: Encoders that have to learn what a position is, from few predictions: without this they stay where they copy what is
#: not masked and know no neighbour (BERT at 92 % of the entropy; 65 % in training with rotary positions).
LEARNED = ["data.sequence_length=16", "batch.sequences=512", "batch.micro=256", "objective.rate=0.3"]
#: Beside the debug config: `LEARNED`, and what needs starts of sentences, which the text here has.
SETTINGS = {
    "bert": [*LEARNED, "model.sentence_head=true", "objective.sentence=next"],
    "roberta": LEARNED,
    "albert": [*LEARNED, "model.sentence_head=true", "objective.sentence=order"],
    **dict.fromkeys(("electra", "crammed", "deberta", "modernbert"), LEARNED),
    "bart": ["objective.damage=[permute,infill]", "data.sequence_length=32", "batch.sequences=256", "batch.micro=128"],
}
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
    from shardwright.model.families import FAMILIES

    p = parser(__doc__, "families.md")
    p.add_argument("--steps", type=int, default=300, help="of each run")
    p.add_argument("--only", default="*", help="pattern of family/text")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "families", help="where runs and prepared text lie")
    p.add_argument("--corpora", type=Path, default=ROOT.parent / "shared" / "corpora", help="folder of pairs")
    p.add_argument("--page", action="store_true", help="write the page of what was measured, and nothing else")
    options = p.parse_args()
    if options.smoke:
        options.steps, options.runs = 10, options.runs.with_name("families-smoke")
        options.out, options.only = None, "gpt2/english"
    every = [f"{family}/{text}" for family in FAMILIES for text in TEXTS if family != "transformer" or pairs(options)]
    options.names = [name for name in every if fnmatch.fnmatch(name, options.only)]
    if not options.names:
        sys.exit(f"families: --only {options.only}: fits none of {', '.join(every)}")
    return options


def pairs(options: argparse.Namespace) -> Path | None:
    """The file of sentence pairs, where it is."""
    path: Path = options.corpora / "translate-en-zh.jsonl.gz"
    return path if path.is_file() else None


def measure(name: str, options: argparse.Namespace) -> Line:
    """One run to its end: validation loss of a token of text, entropy of these tokens, seconds."""
    family, text = name.split("/")
    data = prepared_pairs(text, options) if family == "transformer" else prepared(text, options.runs)
    run = options.runs / name.replace("/", "-")
    overrides = [f"run={run}", f"data.path={data}", f"train.steps={options.steps}", "log.every=50"]
    overrides += ["checkpoint.every=null", *SETTINGS.get(family, [])]
    shutil.rmtree(run, ignore_errors=True)
    begin = time.monotonic()
    shardwright("train", f"configs/debug/{family}.yaml", *overrides, log=run.with_suffix(".log"))
    seconds = time.monotonic() - begin
    last = [line for line in read_lines(run / "metrics.jsonl") if "val_loss" in line][-1]
    losses = {key: value for key, value in last.items() if key.startswith("val_") and key.endswith("_loss")}
    of_targets, copied, share = baseline(run)
    # Of several terms the first is that of tokens; the total mixes kinds.
    loss = losses.get("val_masked_loss", losses["val_loss"]) / share
    found = {
        "loss": loss,
        "losses": losses,
        "entropy": of_targets,
        "copied": copied,
        "text_share": share,
        "seconds": seconds,
    }
    say(f"{name}: {loss:.3f} of {of_targets:.3f} nats a token after {options.steps} steps, {seconds:.0f} s")
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
    """The text's shards with a vocabulary of its own, where sentences and words start indexed too."""
    return prepare(runs / "data" / text, TEXTS[text], "starts=true")


def prepared_pairs(text: str, options: argparse.Namespace) -> Path:
    """Pairs whose targets are in this language."""
    source, target = PAIRS[text]
    folder = options.runs / "data" / f"pairs-{text}"
    return prepare(folder, str(pairs(options)), f"text_field={source}", f"target_field={target}")


def prepare(folder: Path, source: str, *settings: str) -> Path:
    """The prepared folder, made first where it is missing."""
    if not (folder / "manifest.json").is_file():
        say(f"preparing {folder.name}")
        vocabulary = ["tokenizer.train=bpe", f"tokenizer.vocab_size={VOCABULARY}"]
        shardwright("prepare", source, "--output", str(folder), *vocabulary, *settings, log=folder.with_suffix(".log"))
    return folder


# ---------------------------------------------------------------------------------------------- the baseline


def baseline(run: Path) -> tuple[float, float, float]:
    """(nats of a target of the text under the frequencies of training, the same for who copies what is no mask, share
    of the targets that are text).

    The targets are those of the run's last evaluation, the whole split: the very ones that its loss is of.
    """
    from shardwright.parallel.mesh import World
    from shardwright.train.build import build_loader, build_validation
    from shardwright.train.course import Course
    from shardwright.train.settings import read_config

    config, world = read_config(run / "config.yaml"), World()
    size = config.model.vocab_size
    special = [number for use, number in config.objective.special_tokens.items() if use != "end"]

    def counts(batches: Iterator[Mapping[str, Any]]) -> np.ndarray:
        total = np.zeros(size)
        for batch in batches:
            labels, used = batch["labels"].numpy(), batch["weights"].numpy() > 0
            total += np.bincount(labels[used], minlength=size)
        return total

    held = counts(batch for step in build_validation(config, world).batches() for batch in step)
    with build_loader(config, world, Course(config).ramp) as loader:
        seen = counts(batch for step in until(loader.start(), COUNTED) for batch in step.micro_batches)
    text = np.delete(held, special)
    train = np.delete(seen, special) + 1
    entropy = float(-(text * np.log(train / train.sum())).sum() / text.sum())
    return entropy, copying(config.objective, entropy), float(text.sum() / held.sum())


def copying(objective: Any, entropy: float) -> float:
    """Nats a target where a [MASK] is guessed by frequency, and else what stands there is taken for the token as often
    as it is. Of masked language models alone; of others what is predicted is hidden.
    """
    if not hasattr(objective, "mask"):
        return entropy
    other, kept = objective.random, 1 - objective.mask - objective.random
    unsure = sum(p * -np.log(p / (other + kept)) for p in (other, kept) if p > 0)
    return float((objective.mask + other) * entropy + unsure)


def until(steps: Any, sequences: int) -> Iterator[Any]:
    """Steps of a loader, until they have drawn so many sequences."""
    for step in steps:
        yield step
        if step.drawn + step.count >= sequences:
            return


# ---------------------------------------------------------------------------------------------- the page


def newest(lines: Sequence[Line], options: argparse.Namespace) -> list[Line]:
    """The last line of each run of so many steps, in the order of names."""
    found = {line["name"]: line for line in lines if line["steps"] == options.steps}
    return [found[name] for name in options.names if name in found]


def write_page(lines: Sequence[Line], options: argparse.Namespace) -> None:
    """One row a run, and what has none."""
    rows = [
        [
            line["name"],
            f"{line['loss']:.3f}",
            f"{line['entropy']:.3f}",
            f"{line['loss'] / line['entropy']:.0%}",
            f"{line['copied']:.3f}",
            ", ".join(f"{k[4:-5]} {v:.3f}" for k, v in line["losses"].items() if k != "val_loss"),
            f"{line['seconds']:.0f}",
            line["revision"],
        ]
        for line in lines
    ]
    head = (
        f"{options.steps} steps of configs/debug/<family>.yaml on bundled text, or pairs of sentences, with a "
        f"byte-level BPE of {VOCABULARY} tokens. *Loss*: held-out nats a predicted token of text (of the first term, "
        "where there are several; what sentinels cost included); *entropy*: what those same tokens cost by the "
        "frequencies of the tokens that training predicts. A family learns where the first is at most "
        f"{BELOW:.0%} of the second. *With copying*: that entropy for a model which knows no more than frequencies, "
        "but takes a token that no mask stands for as it is. Rows are those of the configs; of "
        f"{', '.join(name for name in SETTINGS if LEARNED[0] in SETTINGS[name])} they have 16 tokens, 512 a step, of "
        "which 30 % are predicted: with their learned positions and fewer predictions 300 steps are too few to find "
        "out what stands beside a mask."
    )
    header = ("family/text", "loss", "entropy", "of it", "with copying", "terms", "seconds", "commit")
    missing = [name for name in options.names if name not in {line["name"] for line in lines}]
    rest = [f"Not measured yet: {', '.join(missing)}."] if missing else []
    parts = [head, facts_table(machine()), table(header, rows), *rest]
    figures = {line["name"]: line["loss"] / line["entropy"] for line in lines}
    publish(options.out, "What each family learns in a few hundred steps", parts, {"of_entropy": figures})


if __name__ == "__main__":
    sys.exit(main())
