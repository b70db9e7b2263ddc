"""Crammed BERT against Hugging Face's BERT by its usual recipe, equal minutes each on this machine.

Both are pre-trained on data/english with the same tokenizer, one after the other, a wall clock each: ours by --config,
its `train.budget` set to the minutes; the peer is a BERT of the same blocks and width (see cram_peer.py), with bf16
autocast and torch.compile where a trial before finds it faster with them, at each of --peer-lr, of which the best one
counts. One evaluator scores all in float32 on the same rows of the validation split, with the same 15 % hidden. Then
both are fine-tuned alike to tell spam, at each of --tune-lr: the rate that is best on held-back training mails is
scored on the test split of spam.jsonl.gz.

A stage that is done has its line in stages.jsonl of --work and is not done again: stop and start it as you like.
Examples: python benchmarks/cram.py
          python benchmarks/cram.py --minutes 2 --peer-lr 5e-4
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    HERE,
    ROOT,
    add_line,
    english,
    facts_table,
    machine,
    parser,
    peer_versions,
    peers_python,
    publish,
    read_lines,
    say,
    table,
)
from cram_peer import MASKED, Pretraining, Tuning
from cram_rows import (
    SPAM,
    Arrays,
    entropy,
    example_rows,
    f1_of,
    fitted_config,
    held_out_rows,
    masked_score,
    peer_inputs,
    spam_f1,
)
from kill import revision_of_tree
from speedrun import clock_of

SHAPE: dict[str, Any] = {"layers": 4, "width": 256, "heads": 4}  # of the peer: BERT-mini's
TUNING: dict[str, Any] = {"batch": 32, "warmup": 0.1}  # of both
PACKAGES = ("torch", "transformers", "accelerate")
OURS, THEIRS = "ours", "Hugging Face"
Line = dict[str, Any]


def main() -> None:
    """Pre-train, score, fine-tune, score, write the page."""
    import torch

    options = arguments()
    torch.set_num_threads(options.threads)
    facts, data = machine(), english()
    options.work.mkdir(parents=True, exist_ok=True)
    stages = Stages(options.work / "stages.jsonl", options)
    held = held_out_rows(options, data)
    pretrained = [pretrain_ours(options, data, stages, held), *pretrain_peers(options, data, stages, held)]
    best = min(pretrained[1:], key=lambda line: line["loss"])
    tuned = tune_both(options, data, stages, {OURS: pretrained[0], THEIRS: best})
    figures = {"benchmark": "cram", "minutes": options.minutes, **facts, "entropy": entropy(data, held)}
    figures |= {"pretrained": pretrained, "tuned": tuned}
    figures |= {"loss_to_best_peer": pretrained[0]["loss"] / best["loss"]}
    if tuned:
        figures["f1"] = {side: chosen(tuned, side)["f1"] for side in (OURS, THEIRS)}
    write_page(options, facts, figures, held)


def arguments() -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "cram.md")
    p.add_argument("--minutes", type=float, default=10.0, help="wall clock of each pre-training")
    p.add_argument("--config", default="configs/cram.yaml", help="our recipe")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of our recipe")
    p.add_argument("--peer-lr", nargs="+", type=float, default=[1e-4, 5e-4], help="peak rates of the peer")
    p.add_argument("--peer-batch", type=int, default=32, help="its rows a step")
    p.add_argument("--peer-dropout", type=float, default=0.1, help="its dropout")
    p.add_argument("--tune-lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="rates of fine-tuning, of both")
    p.add_argument("--tune-steps", type=int, default=400, help="steps of fine-tuning, of both")
    p.add_argument("--trial-steps", type=int, default=30, help="steps by which the peer's speed is tried")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each")
    p.add_argument("--corpora", type=Path, default=ROOT.parent / "shared" / "corpora", help="folder of spam.jsonl.gz")
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "bench-cram", help="folder of all runs")
    options = p.parse_args()
    if options.smoke:
        options.minutes, options.tune_steps, options.trial_steps, options.peer_batch = 0.1, 2, 2, 2
        options.peer_lr, options.tune_lr = options.peer_lr[:1], options.tune_lr[:1]
        options.out, options.work = None, options.work.with_name("bench-cram-smoke")
    options.work = options.work.resolve()
    return options


class Stages:
    """What stages that are done have found, a line each: of this revision, these threads and their own settings."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path, self.common = path, {"revision": revision_of_tree(), "threads": options.threads}

    def once(self, stage: str, do: Callable[[], Line], **settings: Any) -> Line:
        """What the stage finds, by doing it where there is no line of it."""
        key = json.loads(json.dumps({"stage": stage, **self.common, "settings": settings}))
        for line in read_lines(self.path):
            if {name: line.get(name) for name in key} == key:
                say(f"{stage}: is done already")
                return dict(line["found"])
        say(stage)
        found = do()
        add_line(self.path, {**key, "found": found})
        return found


# ----------------------------------------------------------------------------------------------- ours


def pretrain_ours(options: argparse.Namespace, data: Path, stages: Stages, held: Arrays) -> Line:
    """Our recipe for the minutes, by the command line, and its score."""
    run, seconds = options.work / "ours", 60 * options.minutes
    settings = [f"data.path={data}", f"train.budget={seconds:.0f}s", *options.set]
    # Whatever the config says of its length, the clock decides it; evaluating meanwhile would cost time.
    settings += ["train.steps=null", "train.tokens=null", "evaluate.every=null"]

    def do() -> Line:
        train_ours(options, run, settings)
        model = open_ours(run)
        last = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line][-1]
        found = {"name": f"{OURS}, `{options.config}`", "steps": last["step"], "tokens": last["tokens"]}
        return {**found, "seconds": clock_of(run), "folder": str(run), **masked_score(model, held)}

    config = (ROOT / options.config).read_text("utf-8")
    return stages.once(f"{OURS}: pre-training for {options.minutes:g} minutes", do, set=settings, config=config)


def train_ours(options: argparse.Namespace, run: Path, settings: list[str]) -> None:
    """`shardwright train` into a new run folder, on the processor."""
    shutil.rmtree(run, ignore_errors=True)
    fixed = [f"run={run}", "train.device=cpu", f"train.threads={options.threads}"]
    command = [sys.executable, "-m", "shardwright", "train", options.config, *settings, *fixed]
    subprocess.run(command, cwd=ROOT, check=True, env=environment(options))


def open_ours(run: Path) -> Any:
    """The model of a run, in float32."""
    import shardwright

    return shardwright.load(run, device="cpu").model


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Of every child: this checkout, the same threads, and nothing fetched."""
    told = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": str(ROOT), **told}


# ------------------------------------------------------------------------------------------------ peer


def pretrain_peers(options: argparse.Namespace, data: Path, stages: Stages, held: Arrays) -> list[Line]:
    """Hugging Face's BERT for the same minutes at each rate, and its scores."""
    told = {"batch": options.peer_batch, "dropout": options.peer_dropout, "threads": options.threads}
    usual = {**SHAPE, **told, **peer_inputs(options, data)}
    mode = fastest_mode(options, stages, usual)

    def do(lr: float) -> Line:
        from transformers import BertForMaskedLM

        output = str(options.work / f"huggingface-{lr:g}")
        job = Pretraining(**usual, **mode, output=output, seconds=60 * options.minutes, steps=None, lr=lr)
        found = run_peer(options, job)
        model = BertForMaskedLM.from_pretrained(output).float().eval()
        told = {"name": f"{THEIRS}'s BERT, lr {lr:g}", "folder": output, **mode}
        return {**told, **found, **masked_score(model, held)}

    name = f"{THEIRS}: pre-training for {options.minutes:g} minutes at lr {{:g}}"
    settings = {"minutes": options.minutes, **usual, **mode}
    return [stages.once(name.format(lr), lambda lr=lr: do(lr), lr=lr, **settings) for lr in options.peer_lr]


def fastest_mode(options: argparse.Namespace, stages: Stages, usual: Line) -> dict[str, bool]:
    """bf16 autocast or not, torch.compile or not: what makes the most steps a second, compiling not counted."""
    output, modes = str(options.work / "trial"), []
    for bf16, compiled in product((True, False), (False, True)):
        mode = {"bf16": bf16, "compiled": compiled}
        job = Pretraining(**usual, **mode, output=output, seconds=None, steps=options.trial_steps, lr=1e-4)
        name = f"{THEIRS}: speed with bf16={bf16}, compiled={compiled}"
        modes.append({**mode, **stages.once(name, lambda job=job: run_peer(options, job), **asdict(job))})
        say(f"  {modes[-1].get('steps_per_s', 0.0):.2f} steps/s")
    best = max(modes, key=lambda found: found.get("steps_per_s", 0.0))
    return {"bf16": best["bf16"], "compiled": best["compiled"]}


def run_peer(options: argparse.Namespace, job: Pretraining | Tuning) -> Line:
    """A job of the peer, in its own environment. A trial may fail; its last words are then what was found."""
    shutil.rmtree(job.output, ignore_errors=True)
    trial = isinstance(job, Pretraining) and job.seconds is None
    command = [str(peers_python()), str(HERE / "cram_peer.py"), json.dumps(asdict(job))]
    told = environment(options) | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=options.work, stdout=subprocess.PIPE, text=True, check=not trial, env=told)
    if done.returncode:
        say(f"left out, since it ended with {done.returncode}")
        return {"failed": done.returncode}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------------------------------- fine-tuning


def tune_both(options: argparse.Namespace, data: Path, stages: Stages, begins: dict[str, Line]) -> list[Line]:
    """Both fine-tuned at each rate, with the F1 of held-back training mails and of the test split; [] without mails."""
    given = options.corpora / "spam.jsonl.gz"
    if not given.is_file():
        say(f"{given}: no such file, so no spam is told; name its folder with --corpora")
        return []
    folders = prepare_mails(options, data, given)
    config = fitted_config(options, folders["train"], "objective={name: classify}", f"begin={begins[OURS]['folder']}")
    splits = {"train": ("train", "train"), "validation": ("train", "validation"), "test": ("test", "train")}
    rows = {name: example_rows(config, folders[of], split) for name, (of, split) in splits.items()}
    np.savez(options.work / "mails.npz", **rows["train"])
    facts = {
        "mails": len(rows["test"]["labels"]),
        "all_spam": f1_of(rows["test"], np.full_like(rows["test"]["labels"], SPAM)),
    }
    tune = {OURS: tune_ours, THEIRS: tune_peer}

    def do(side: str, lr: float) -> Line:
        model = tune[side](options, begins[side], folders["train"], lr)
        scores = {"validation_f1": spam_f1(model, rows["validation"]), "f1": spam_f1(model, rows["test"])}
        return {"side": side, "lr": lr, **scores, **facts}

    found = []
    for side, lr in product(begins, options.tune_lr):
        settings = {"lr": lr, "steps": options.tune_steps, "begin": begins[side], **TUNING}
        name = f"{side}: fine-tuning at lr {lr:g}"
        found.append(stages.once(name, lambda side=side, lr=lr: do(side, lr), **settings))
        say(f"  F1 {found[-1]['f1']:.4f}, of held-back training mails {found[-1]['validation_f1']:.4f}")
    return found


def prepare_mails(options: argparse.Namespace, data: Path, given: Path) -> dict[str, Path]:
    """The given splits, prepared with the tokenizer of the corpus; a tenth of `train` is its validation split."""
    folders = {"train": options.work / "spam", "test": options.work / "spam-test"}
    with gzip.open(given, "rt", encoding="utf-8") as file:
        mails = [json.loads(line) for line in file]
    for (split, folder), every in zip(folders.items(), (10, 0), strict=True):
        if (folder / "manifest.json").is_file():
            continue
        chosen = folder.with_suffix(".jsonl")
        chosen.write_text("".join(json.dumps(mail) + "\n" for mail in mails if mail["split"] == split), "utf-8")
        recipe = ["class_field=label", f"tokenizer.path={data}", f"validation_every={every}"]
        command = ["prepare", str(chosen), "--output", str(folder), *recipe]
        subprocess.run([sys.executable, "-m", "shardwright", *command], cwd=ROOT, check=True, env=environment(options))
    return folders


def tune_ours(options: argparse.Namespace, begin: Line, mails: Path, lr: float) -> Any:
    """Ours on the head of classes, as a user fine-tunes it; the model."""
    run, steps, batch = options.work / f"ours-spam-{lr:g}", options.tune_steps, TUNING["batch"]
    settings = [f"begin={begin['folder']}", "objective={name: classify}", f"data.path={mails}", *options.set]
    settings += ["train.budget=null", "train.tokens=null", f"train.steps={steps}", "batch.ramp=null"]
    settings += [f"batch.sequences={batch}", f"batch.micro={batch}", f"optimizer.lr={lr}", "train.clip=1.0"]
    settings += ["optimizer.betas=[0.9,0.999]", "optimizer.eps=1.0e-8", "model.residual_dropout=0.1"]
    settings += [f"schedule.warmup={TUNING['warmup']}", "schedule.start=0.0", "evaluate.every=null"]
    train_ours(options, run, settings)
    return open_ours(run)


def tune_peer(options: argparse.Namespace, begin: Line, mails: Path, lr: float) -> Any:
    """The peer on its own head of classes; the model."""
    from transformers import BertForSequenceClassification

    output, rows = str(options.work / f"huggingface-spam-{lr:g}"), str(options.work / "mails.npz")
    usual = {**TUNING, "steps": options.tune_steps, "threads": options.threads, "bf16": begin["bf16"]}
    run_peer(options, Tuning(model=begin["folder"], rows=rows, output=output, lr=lr, **usual))
    return BertForSequenceClassification.from_pretrained(output).float().eval()


def chosen(tuned: list[Line], side: str) -> Line:
    """The fine-tuning of a side that was best on the held-back mails."""
    return max((line for line in tuned if line["side"] == side), key=lambda line: line["validation_f1"])


# ------------------------------------------------------------------------------------------------- page


def write_page(options: argparse.Namespace, facts: Line, figures: Line, held: Arrays) -> None:
    """The page of what was found, and the figures as the last line."""
    pretrained, tuned = figures["pretrained"], figures["tuned"]
    versions = {f"peers' {name}": version for name, version in peer_versions(PACKAGES).items()}
    parts = [introduction(options, pretrained[1], held), facts_table({**facts, **versions})]
    parts += [scores_table(pretrained, figures["entropy"]), words(figures)]
    parts += [tuning_words(options, tuned), tuning_table(tuned)] if tuned else ["Spam: no spam.jsonl.gz was there."]
    publish(options.out, "Crammed BERT against BERT", parts, figures)


def introduction(options: argparse.Namespace, peer: Line, held: Arrays) -> str:
    """What was measured."""
    shape = ", ".join(f"{field} {value}" for field, value in {**SHAPE, "batch": options.peer_batch}.items())
    mode = f"{'bf16 autocast' if peer['bf16'] else 'float32'}, {'compiled' if peer['compiled'] else 'not compiled'}"
    return (
        f"{options.minutes:g} minutes of pre-training each on this machine, one after the other, on the bundled "
        f"English corpus with its byte-level BPE of 8,192 tokens and four special ones. Ours is `{options.config}`, by "
        f"`shardwright train`. The peer is transformers' BertForMaskedLM of random weights ({shape}) under Trainer by "
        f"its usual recipe: {MASKED:.0%} hidden by DataCollatorForLanguageModeling, AdamW, betas 0.9 and 0.999, decay "
        f"0.01, clipping 1.0, dropout {options.peer_dropout:g}, linear warm-up over 5 % of the time, then linear to "
        f"zero at its end; {mode}, which was the fastest here. Starting and compiling are in the minutes of both. All "
        f"are scored by one evaluator in float32 on the same {int(held['weights'].sum()):,} hidden tokens, "
        f"{MASKED:.0%} of every row of {held['input_ids'].shape[1]} of the validation split."
    )


def scores_table(pretrained: list[Line], entropy: float) -> str:
    """A line a model."""
    rows: list[tuple[Any, ...]] = [
        (
            line["name"],
            f"{line['parameters'] / 1e6:.1f} M",
            f"{line['steps']:,}",
            f"{line['tokens']:,}",
            f"{line['seconds']:.0f}",
            f"{line['loss']:.3f}",
            f"{line['accuracy']:.1%}",
        )
        for line in pretrained
    ]
    rows.append(("by how often each token comes", "", "", "", "", f"{entropy:.3f}", ""))
    return table(("", "parameters", "steps", "tokens", "seconds", "nats a hidden token", "told right"), rows)


def words(figures: Line) -> str:
    """The comparison in a sentence."""
    ours, *peers = figures["pretrained"]
    best = min(peers, key=lambda line: line["loss"])
    less = 1 - ours["loss"] / best["loss"]
    return f"Ours has {abs(less):.1%} {'less' if less >= 0 else 'more'} loss than {best['name']}."


def tuning_words(options: argparse.Namespace, tuned: list[Line]) -> str:
    """What fine-tuning was."""
    return (
        f"Then both, the peer at its better rate, are fine-tuned to tell spam from ham: {options.tune_steps} steps of "
        f"{TUNING['batch']} mails, cut to the length of a row, AdamW with linear warm-up over "
        f"{TUNING['warmup']:.0%} and then to zero, dropout 0.1. F1 of spam, by scikit-learn, on the "
        f"{tuned[0]['mails']:,} mails of the given test split; the rate that counts (*) is the best on a tenth of the "
        f"training mails, held back. Calling everything spam has {tuned[0]['all_spam']:.3f}."
    )


def tuning_table(tuned: list[Line]) -> str:
    """A line a fine-tuning."""
    best = [chosen(tuned, side) for side in (OURS, THEIRS)]
    rows = [
        (
            f"{line['side']}, lr {line['lr']:g}{' *' if line in best else ''}",
            f"{line['validation_f1']:.3f}",
            f"{line['f1']:.3f}",
        )
        for line in tuned
    ]
    return table(("", "F1, held-back mails", "F1, test mails"), rows)


if __name__ == "__main__":
    main()
