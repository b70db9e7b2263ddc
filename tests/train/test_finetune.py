"""Fine-tuning to tell classes, in every family: labelled examples are learned, from scratch or from a trained stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardwright
from shardwright.config import Config, ConfigError
from shardwright.data.examples import write_examples
from shardwright.data.tokenizers import Tokenizer
from shardwright.model.families import FAMILIES
from shardwright.objective.classify import FRAMES
from shardwright.parallel.mesh import World
from shardwright.serve.generate import stream_tokens
from shardwright.train.build import build_corpus, build_loader, build_step, build_validation, fit_to_corpus
from shardwright.train.course import Course
from shardwright.train.evaluate import evaluate
from shardwright.train.run import train
from shardwright.train.settings import read_config

WORLD = World(0, 1, torch.device("cpu"))
SMALL = {"layers": 2, "width": 32, "heads": 2, "max_length": 32}


def texts(seed: int, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Random tokens, most of them of the third of the alphabet that is their class: (ids, 1 + the class)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size, kind = rng.integers(5, 20), rng.integers(3)
        ids = np.where(rng.random(size) < 0.2, rng.integers(60, 90, size), rng.integers(60, 70, size) + 10 * kind)
        yield ids.tolist(), [1 + int(kind)]


def words(seed: int, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """The same texts with a class of every second token, which its id says."""
    for ids, _ in texts(seed, count):
        yield ids, [(1 + number % 3) * (place % 2) for place, number in enumerate(ids)]


@pytest.fixture(scope="module")
def labelled(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokenizer, found = Tokenizer.load(prepared), {}
    for of, source in (("text", texts), ("tokens", words)):
        found[of] = tmp_path_factory.mktemp(of)
        write_examples(found[of], {"train": source(1, 400), "validation": source(2, 60)}, tokenizer)
    return found


def config_of(folder: Path, run: Path, family: str, of: str, *overrides: str, **model: Any) -> Config:
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"family": family, **SMALL, **model},
        "objective": {"name": "classify", "of": of, "classes": 3},
        "data": {"path": str(folder), "sequence_length": 24, "lanes": 4, "workers": 0},
        "batch": {"sequences": 32, "micro": 32},
        "train": {"steps": 80, "compile": False, "device": "cpu"},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.0},
        "log": {"every": 1, "tensorboard": False},
    }
    return read_config(raw, overrides)


def learn(config: Config) -> tuple[float, float]:
    """Validation loss before and after."""
    fit_to_corpus(config, build_corpus(config))
    step, validation, course = build_step(config, WORLD), build_validation(config, WORLD), Course(config)
    figures = [evaluate(step.stages, validation)]
    with build_loader(config, WORLD, course.ramp) as loader:
        for number, batch in zip(range(config.train.steps or 0), loader.start(), strict=False):
            step.accumulate(batch.micro_batches, torch.tensor(number))
            step.update(1.0)
    figures.append(evaluate(step.stages, validation))
    before, after = (found["val_loss"] for found in figures if found is not None)
    return before, after


@pytest.mark.parametrize("family", FAMILIES)
def test_classify(family: str, labelled: dict[str, Path], tmp_path: Path) -> None:
    """Three classes of texts: from the entropy of a guess to less than half of it."""
    before, after = learn(config_of(labelled["text"], tmp_path / "run", family, "text"))
    assert before < 3 and after < 0.5


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.kind != "encoder-decoder"])
def test_classify_tokens(family: str, labelled: dict[str, Path], tmp_path: Path) -> None:
    before, after = learn(config_of(labelled["tokens"], tmp_path / "run", family, "tokens", "train.steps=40"))
    assert before < 3 and after < 0.5


@pytest.mark.parametrize("family", ["t5", "bart", "transformer"])
def test_an_encoder_decoder_tells_no_classes_of_tokens(family: str, labelled: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classify=tokens: an encoder-decoder tells classes of texts alone") as error:
        config_of(labelled["tokens"], tmp_path, family, "tokens")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gpt2", "bert", "electra", "modernbert"])
def test_a_classifier_begins_from_what_was_pre_trained(
    family: str, prepared: Path, labelled: dict[str, Path], tmp_path: Path
) -> None:
    """The stack is the pre-trained one, and what its head has in common; the vocabulary and its special tokens too."""
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["train.steps=1", "batch.sequences=2", "batch.micro=2"]
    usual = {"electra": "replaced", "gpt2": "causal"}.get(family, "masked")
    config = config_of(prepared, first, family, "text", f"objective={{name: {usual}}}", *small)
    train(config)
    tuned = config_of(labelled["text"], second, family, "text", f"begin={first}", *small, "optimizer.lr=1e-30")
    train(tuned)
    before, after = shardwright.load(first), shardwright.load(second)
    known = dict(before.model.named_parameters())
    for name, parameter in after.model.named_parameters():
        theirs = name.replace("head.label.pooler.dense", "head.sentence.pooler")
        if family == "modernbert":
            theirs = name.replace("head.label.pooler", "head.transform")
        if theirs in known:
            torch.testing.assert_close(parameter, known[theirs], atol=1e-9, rtol=0.0)
        else:
            assert name.startswith("head.label.")
    assert after.config.model.vocab_size == before.config.model.vocab_size
    ours, theirs = after.config.objective.special_tokens, before.config.objective.special_tokens
    assert ours.items() <= theirs.items()
    assert after(input_ids=torch.zeros(2, 5, dtype=torch.int64))["logits"].shape == (2, 3)
    with pytest.raises(ConfigError, match="tells classes and cannot generate text"):
        next(stream_tokens(after.model, [1], max_new_tokens=1))


def test_a_head_of_other_classes_is_refused(labelled: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tells .*'classes': 3.* and the model .*'classes': 5"):
        config_of(labelled["text"], tmp_path, "bert", "text", classify="text", classes=5)
    with pytest.raises(ConfigError, match=r"model.classify=text: is trained by objective.name=classify"):
        config_of(labelled["text"], tmp_path, "bert", "text", "objective={name: masked}", classify="text")
    with pytest.raises(ConfigError, match="generator_layers=2: nothing trains a generator beside a classifier"):
        config_of(labelled["text"], tmp_path, "electra", "text", generator_layers=2)


def test_every_kind_of_model_has_its_frame() -> None:
    kinds = {family.kind for family in FAMILIES.values()}
    assert kinds - {"generator and discriminator"} == FRAMES.keys()
