"""Validation bits per byte after some minutes on this machine: this project's recipe against Hugging Face's GPT-2.

Both train on data/english, with the same tokenizer, one after the other, a wall clock each that starts with the first
step: ours by --config, its `train.budget` set to the minutes; the peer is a GPT-2 of 14 M parameters by its usual
recipe (see speedrun_peer.py). One evaluator then scores both, in float32, over every token of the validation split,
each model at the sequence length and with the document boundaries that it was trained with. `xz -9e` stands beside.

Example: python benchmarks/speedrun.py --minutes 10
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import (
    HERE,
    ROOT,
    english,
    facts_table,
    machine,
    parser,
    peer_versions,
    peers_python,
    publish,
    say,
    table,
)
from speedrun_peer import Recipe

AIM = 0.15
PEER: dict[str, Any] = {"layers": 6, "width": 384, "heads": 6, "length": 512, "batch": 8}
PACKAGES = ("torch", "transformers")


class Score(NamedTuple):
    """What a model came to."""

    name: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    bits: float


def main() -> None:
    """Train both, score both, write the page, print the figures."""
    options = arguments()
    facts = machine(options.device)
    data, work = english(), options.work
    work.mkdir(parents=True, exist_ok=True)
    ours = train_ours(options, data, work)
    peers = [train_peer(options, data, work, lr) for lr in options.hf_lr]
    xz = xz_bits(data)
    best = min(peers, key=lambda score: score.bits, default=None)
    figures = {"benchmark": "speedrun", "minutes": options.minutes, **facts, "xz_bits_per_byte": xz}
    figures |= {"ours": ours._asdict(), "peers": [score._asdict() for score in peers]}
    if best:
        figures |= {"ratio_to_best_peer": ours.bits / best.bits, "fewer_bits": 1 - ours.bits / best.bits}
    versions = {f"peers' {name}": version for name, version in peer_versions(PACKAGES).items()}
    parts = [introduction(options), facts_table({**facts, **versions}), scores_table([ours, *peers], xz)]
    parts.append(words(ours, best))
    publish(None if options.smoke else options.out, "Bits per byte after some minutes", parts, figures)


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "speedrun.md")
    p.add_argument("--minutes", type=float, default=10.0, help="wall clock of each")
    p.add_argument("--config", default="configs/speedrun.yaml", help="our recipe")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of our recipe")
    p.add_argument("--hf-lr", nargs="*", type=float, default=[6e-4], help="peak rates of the peer; the best one counts")
    p.add_argument("--hf-dropout", type=float, default=0.1, help="its dropout")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "bench-speedrun", help="folder of both runs")
    options = p.parse_args()
    if options.smoke:
        options.minutes, options.work = 0.1, options.work.with_name("bench-speedrun-smoke")
    return options


# ------------------------------------------------------------------------------------------------- ours


def train_ours(options: argparse.Namespace, data: Path, work: Path) -> Score:
    """Our recipe for the minutes, by the command line, and its score."""
    import shardwright

    run = work / "ours"
    shutil.rmtree(run, ignore_errors=True)
    seconds = 60 * options.minutes
    settings = [f"run={run}", f"data.path={data}", f"train.budget={seconds:.0f}s", f"train.device={options.device}"]
    # Whatever the config says of its length, the clock decides it; evaluating meanwhile would cost time.
    settings += ["train.steps=null", "train.tokens=null", "evaluate.every=null", *options.set]
    say(f"ours: training {options.config} for {options.minutes:g} minutes")
    subprocess.run([sys.executable, "-m", "shardwright", "train", options.config, *settings], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    seconds = clock_of(run)
    loaded = shardwright.load(run, device="cpu")
    config: Any = loaded.config
    named = ("input_ids", "position_ids", "documents")
    say("ours: scoring")
    bits = bits_per_byte(
        lambda batch: loaded.model(**{name: batch[name] for name in named if name in batch})["logits"],
        data,
        config.data.sequence_length,
        mask_documents=config.data.mask_documents,
        reset_positions=config.data.reset_positions,
    )
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return Score(f"ours, `{options.config}`", parameters, last["step"], last["tokens"], seconds, bits)


def clock_of(run: Path) -> float:
    """Seconds of training, as the last checkpoint has them."""
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text("utf-8").strip()
    return float(json.loads((checkpoint / "manifest.json").read_text("utf-8"))["state"]["position"]["elapsed"])


# ------------------------------------------------------------------------------------------------ peer


def train_peer(options: argparse.Namespace, data: Path, work: Path, lr: float) -> Score:
    """Hugging Face's GPT-2 for the same minutes, and its score."""
    from transformers import GPT2LMHeadModel

    recipe = build_recipe(options, data, work, lr)
    shutil.rmtree(recipe.output, ignore_errors=True)
    say(f"Hugging Face: training for {options.minutes:g} minutes at lr {lr:g}")
    command = [str(peers_python()), str(HERE / "speedrun_peer.py"), json.dumps(asdict(recipe))]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    model = GPT2LMHeadModel.from_pretrained(recipe.output).float().eval()
    say("Hugging Face: scoring")
    bits = bits_per_byte(lambda batch: model(input_ids=batch["input_ids"])["logits"], data, recipe.length)
    return Score(f"Hugging Face GPT-2, lr {lr:g}", model.num_parameters(), bits=bits, **facts)


def build_recipe(options: argparse.Namespace, data: Path, work: Path, lr: float) -> Recipe:
    """The peer's recipe, its tokens written where it can read them."""
    from shardwright.data.manifest import Manifest

    manifest = Manifest.load(data)
    tokens = work / "train.npy"
    np.save(tokens, split_tokens(data))
    return Recipe(
        tokens=str(tokens),
        output=str(work / f"huggingface-{lr:g}"),
        seconds=60 * options.minutes,
        vocab_size=manifest.tokenizer["vocab_size"],
        end_of_document=manifest.end_of_document,
        device=options.device,
        lr=lr,
        dropout=options.hf_dropout,
        **PEER,
    )


def split_tokens(data: Path, split: str = "train") -> np.ndarray:
    """All tokens of a split, in the order of its shards."""
    from shardwright.data.manifest import Manifest
    from shardwright.data.shards import Shard

    shards = [Shard(data / info.path, data / info.index) for info in Manifest.load(data).split(split).shards]
    return np.concatenate([shard.tokens(0, shard.num_tokens) for shard in shards])


# --------------------------------------------------------------------------------------------- scoring


def bits_per_byte(
    logits_of: Callable[[dict[str, Any]], Any],
    data: Path,
    length: int,
    *,
    mask_documents: bool = False,
    reset_positions: bool = False,
) -> float:
    """Bits of all validation tokens over the bytes of their text, each token predicted once, in rows of `length`."""
    import torch
    from torch.nn.functional import cross_entropy

    from shardwright.data.loader import Loader
    from shardwright.data.order import Plan
    from shardwright.data.stream import ValidationStream
    from shardwright.objective.causal import Causal, CausalConfig
    from shardwright.objective.setting import Setting

    stream = ValidationStream([str(data)], raw_length=length + 1, stride=length)
    plan = Plan(global_batch=8, micro_batch=8, lanes=1)
    setting = Setting(length, mask_documents=mask_documents, reset_positions=reset_positions, evaluation=True)
    objective = Causal(CausalConfig(), setting)
    nats, count = 0.0, 0.0
    with torch.no_grad(), Loader(stream, plan, objective) as loader:
        for step in loader:
            for batch in step.micro_batches:
                logits = logits_of(batch).float().flatten(0, 1)
                losses = cross_entropy(logits, batch["labels"].flatten(), reduction="none")
                weights = batch["weights"].flatten()
                nats, count = nats + float((losses * weights).double().sum()), count + float(weights.sum())
    assert count == stream.num_tokens, (count, stream.num_tokens)
    return nats / math.log(2) / stream.text_bytes


def xz_bits(data: Path) -> float:
    """What xz -9e needs for a byte of the same text."""
    from shardwright.data.manifest import Manifest
    from shardwright.data.tokenizers import Tokenizer
    from shardwright.train.evaluate import split_text, xz_bits_per_byte

    return xz_bits_per_byte(split_text(Manifest.load(data), Tokenizer.load(data)))


# ------------------------------------------------------------------------------------------------- page


def introduction(options: argparse.Namespace) -> str:
    """What was measured."""
    shape = ", ".join(f"{field} {value}" for field, value in PEER.items())
    return (
        f"{options.minutes:g} minutes of training each on this machine, one after the other, on the bundled English "
        "corpus with its byte-level BPE of 8,192 tokens; both scored by one evaluator in float32 over every validation "
        f"token. The peer is transformers' GPT2LMHeadModel ({shape}) under Trainer by its usual recipe: AdamW, betas "
        f"0.9 and 0.999, weight decay 0.1, clipping 1.0, dropout {options.hf_dropout:g}, bf16 autocast, warm-up over "
        "5 % of the time, then cosine to zero at its end."
    )


def scores_table(scores: list[Score], xz: float) -> str:
    """A line a model."""
    rows: list[tuple[Any, ...]] = [
        (s.name, f"{s.parameters / 1e6:.1f} M", s.steps, f"{s.tokens:,}", f"{s.seconds:.0f}", f"{s.bits:.3f}")
        for s in scores
    ]
    rows.append(("xz -9e", "", "", "", "", f"{xz:.3f}"))
    return table(("", "parameters", "steps", "tokens", "seconds", "bits per byte"), rows)


def words(ours: Score, best: Score | None) -> str:
    """The comparison in a sentence."""
    if best is None:
        return "No peer was trained."
    fewer = 1 - ours.bits / best.bits
    return f"Ours needs {fewer:.1%} fewer bits than {best.name} (the aim is {AIM:.0%})."


if __name__ == "__main__":
    main()
