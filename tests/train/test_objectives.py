"""Objectives in a run: special tokens and vocabulary, batches of the loader, steps, evaluation; what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardwright.config import Config, ConfigError, parse
from shardwright.data.prepare import PrepareConfig, prepare
from shardwright.parallel.mesh import World
from shardwright.train import build
from shardwright.train.build import build_corpus, build_loader, build_step, build_validation, fit_to_corpus
from shardwright.train.course import Course
from shardwright.train.evaluate import _figures, evaluate
from shardwright.train.settings import read_config

WORLD = World(0, 1, torch.device("cpu"))
Tiny = Callable[..., Config]


def _fitted(config: Config) -> Config:
    fit_to_corpus(config, build_corpus(config))
    return config


def test_a_family_takes_the_objectives_of_its_kind(tiny: Tiny) -> None:
    with pytest.raises(
        ConfigError, match=r"objective\.name=masked: trains models of kind encoder, .*gpt2 is a decoder"
    ):
        _fitted(tiny("objective={name: masked}"))
    config = _fitted(tiny())
    assert config.objective.special_tokens == {} and config.data.vocab_size == config.model.vocab_size == 512


def test_masked_steps_and_evaluation(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plumbing of an objective with predictions at places, on the one model there is."""
    monkeypatch.setattr(build, "check_objective", lambda config: None)
    config = _fitted(tiny("objective={name: masked}"))
    added = config.objective.special_tokens
    assert sorted(added.values()) == [512, 513, 514, 515] and config.model.vocab_size == 516
    again = read_config(config.model_dump())
    assert _fitted(again).objective.special_tokens == added
    step = build_step(config, WORLD)
    losses = []
    with build_loader(config, WORLD, Course(config).ramp) as loader:
        for number, batch in zip(range(6), loader.start(), strict=False):
            assert batch.micro_batches[0]["places"].shape == (2, 10)
            step.accumulate(batch.micro_batches, torch.tensor(number))
            losses.append(step.update(1.0)[0].item())
    assert abs(losses[0] - math.log(516)) < 0.3 and losses[-1] < losses[0]
    validation = build_validation(config, WORLD)
    found, other = (evaluate(step.stages, validation) for _ in range(2))
    assert found == other and found is not None and found.keys() == {"val_loss", "val_perplexity"}
    assert abs(found["val_loss"] - losses[-1]) < 0.5


def test_an_evaluation_tells_of_each_term(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_objective", lambda config: None)
    config = _fitted(tiny("objective={name: replaced, weight: 3.0}"))
    figures = _figures([6.0, 2.0], [3.0, 8.0], build_validation(config, WORLD))
    assert figures == {
        "val_loss": 2.75, "val_perplexity": math.exp(2.0), "val_masked_loss": 2.0, "val_replaced_loss": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "length"), [("masked", 2), ("masked, sentence: next", 3), ("permuted", 2)])
def test_rows_without_room_for_text_are_refused(tiny: Tiny, name: str, length: int) -> None:
    config = tiny(f"objective={{name: {name}}}", f"data.sequence_length={length}")
    with pytest.raises(ConfigError, match=f"data.sequence_length={length}: the special tokens of objective"):
        build.build_objective(config)


def test_marks_that_a_corpus_lacks_are_asked_for(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_objective", lambda config: None)
    (tmp_path / "some.txt").write_text("One sentence. Another one. " * 400, "utf-8")
    raw = {"input": [str(tmp_path / "some.txt")], "output": str(tmp_path / "bare"), "tokenizer": {"vocab_size": 300}}
    prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    config = _fitted(tiny("objective={name: masked, whole_words: true}", f"data.path={tmp_path / 'bare'}"))
    with pytest.raises(ConfigError, match="does not say where words start.*starts=true"):
        build_loader(config, WORLD, Course(config).ramp)
    config = _fitted(tiny("objective={name: pairs}"))
    with pytest.raises(ConfigError, match="holds texts, the objective needs examples"):
        build_loader(config, WORLD, Course(config).ramp)
