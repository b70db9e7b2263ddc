"""What both sides of cram.py are given and scored on: the same rows, tokens, hidden places and tokenizer.

Rows are those of our own validation and fine-tuning, as arrays by Hugging Face's names, so that either model can be
called with them. Shapes: N rows, T tokens of a row, P hidden places of a row, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT
from cram_peer import MASKED
from speedrun import split_tokens

SPECIALS = {"mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}
SPAM = 1  # classes are numbered by the alphabet: ham, spam
Arrays = dict[str, np.ndarray]
Line = dict[str, Any]


def fitted_config(options: argparse.Namespace, data: Path, *overrides: str) -> Any:
    """Our config with the corpus' special tokens and vocabulary filled in, as a run has it."""
    from shardwright.train.begin import take_special_tokens
    from shardwright.train.build import build_corpus, fit_to_corpus
    from shardwright.train.settings import read_config

    config = read_config(ROOT / options.config, [f"data.path={data}", *options.set, *overrides])
    take_special_tokens(config)  # those of `begin`, where that is given
    fit_to_corpus(config, build_corpus(config))
    return config


def held_out_rows(options: argparse.Namespace, data: Path) -> Arrays:
    """All of the validation split as rows of both models, with 15 % hidden: `input_ids` and `attention_mask` [N, T],
    `labels`, `places` and `weights` [N, P]."""
    from shardwright.parallel.mesh import World
    from shardwright.train.build import build_validation

    config = fitted_config(options, data, f"objective.rate={MASKED}")
    return rows_of(batch for step in build_validation(config, World()).batches() for batch in step)


def example_rows(config: Any, folder: Path, split: str) -> Arrays:
    """All examples of a split as our fine-tuning reads them: `input_ids` and `attention_mask` [N, T], `labels` [N]."""
    from shardwright.data.examples import ValidationExamples
    from shardwright.parallel.mesh import World
    from shardwright.train.build import build_objective
    from shardwright.train.evaluate import Validation

    objective, length = build_objective(config, evaluation=True), config.data.sequence_length
    stream = ValidationExamples([str(folder)], raw_length=objective.raw_length(length), split=split)
    found = Validation(stream, objective, length=length, batch=64, world=World())
    rows = rows_of(batch for step in found.batches() for batch in step)
    return {name: rows[name] for name in ("input_ids", "attention_mask")} | {"labels": rows["labels"][:, 0]}


def rows_of(batches: Iterable[Any]) -> Arrays:
    """Batches as one array a name, without the rows that fill up the last of them."""
    parts = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    joined["attention_mask"] = (joined["documents"] >= 0).astype(np.int64)
    return {name: array[joined["sequence"] >= 0] for name, array in joined.items()}


def logits_of(model: Any, rows: Arrays, batch: int = 32) -> Iterator[tuple[slice, Any]]:
    """(which rows, logits) of a model that is called by Hugging Face's names, in float32."""
    import torch

    with torch.no_grad():
        for first in range(0, len(rows["input_ids"]), batch):
            part = slice(first, first + batch)
            told = {name: torch.from_numpy(rows[name][part]) for name in ("input_ids", "attention_mask")}
            yield part, model(**told)["logits"].float()


def masked_score(model: Any, held: Arrays) -> Line:
    """Nats a hidden token, how many of them are told right, and the model's size."""
    import torch
    from torch.nn.functional import cross_entropy

    nats, right = 0.0, 0.0
    for part, logits in logits_of(model, held):
        labels, places, weights = (torch.from_numpy(held[name][part]) for name in ("labels", "places", "weights"))
        found = logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1])).flatten(0, 1)
        losses = cross_entropy(found, labels.flatten(), reduction="none")
        nats += float((losses * weights.flatten()).double().sum())
        right += float(((found.argmax(-1) == labels.flatten()) * weights.flatten()).sum())
    count, parameters = float(held["weights"].sum()), sum(p.numel() for p in model.parameters())
    return {"loss": nats / count, "accuracy": right / count, "parameters": parameters}


def entropy(data: Path, held: Arrays) -> float:
    """Nats a hidden token costs by how often each token comes in the training split."""
    seen = np.bincount(split_tokens(data), minlength=int(held["labels"].max()) + 1) + 1.0
    labels = held["labels"][held["weights"] > 0]
    return float(-np.log(seen[labels] / seen.sum()).mean())


def spam_f1(model: Any, rows: Arrays) -> float:
    """F1 of the class spam."""
    return f1_of(rows, np.concatenate([logits.argmax(-1).numpy() for _, logits in logits_of(model, rows)]))


def f1_of(rows: Arrays, told: np.ndarray) -> float:
    """The same for what was told of each row."""
    from sklearn.metrics import f1_score

    return float(f1_score(rows["labels"], told, pos_label=SPAM, zero_division=0.0))


def peer_inputs(options: argparse.Namespace, data: Path) -> Line:
    """Rows of `[CLS] text [SEP]` from the training split, and the tokenizer with these, written where it reads them."""
    config = fitted_config(options, data)
    ids, length = config.objective.special_tokens, config.data.sequence_length
    text = split_tokens(data).astype(np.int64)
    text = text[: len(text) // (length - 2) * (length - 2)].reshape(-1, length - 2)
    rows = np.pad(text, ((0, 0), (1, 1)))
    rows[:, 0], rows[:, -1] = ids["cls"], ids["sep"]
    places = {"rows": options.work / "rows.npy", "tokenizer": options.work / "tokenizer.json"}
    np.save(places["rows"], rows)
    end = write_tokenizer(places["tokenizer"], data, ids)
    specials = {f"{use}_token": name for use, name in SPECIALS.items()} | {"eos_token": end}
    return {**{name: str(path) for name, path in places.items()}, "specials": specials}


def write_tokenizer(path: Path, data: Path, ids: dict[str, int]) -> str:
    """The corpus' tokenizer with the special tokens that ours has, under the same ids; the end of a document's name."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    from shardwright.data.tokenizers import Tokenizer

    known = Tokenizer.load(data)
    library = Library.from_str(known.data.decode())
    uses = sorted(SPECIALS, key=lambda use: ids[use])
    library.add_special_tokens([AddedToken(SPECIALS[use], special=True) for use in uses])
    assert all(library.token_to_id(SPECIALS[use]) == ids[use] for use in uses), ids
    library.save(str(path))
    return known.spelling(known.end_of_document) or ""
