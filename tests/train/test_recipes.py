"""The configs that are shipped are the papers' recipes: rates by the papers' own formulas, figures by their tables."""

import math
from pathlib import Path

import pytest
import torch

from shardwright.model.families import FAMILIES
from shardwright.train.course import Course
from shardwright.train.optim import Adafactor, build_optimizer, set_factor
from shardwright.train.position import Position
from shardwright.train.settings import read_config

GPT3 = [("gpt3", 6e-4, 524288, 4e9), ("gpt3-175b", 6e-5, 3.2e6, 12e9)]  # rate; batch and ramp in tokens
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def rate(name: str, step: int) -> float:
    """Learning rate of the n-th step, n = step + 1/2: the middle of it, as schedule.py counts."""
    config = read_config(name)
    course = Course(config)
    drawn = course.ramp.drawn_after(step)
    factor = course.factor(Position(step=step, drawn=drawn), course.ramp.batch_at(drawn), 0.0)
    return config.optimizer.lr * factor


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("folder", [".", "debug"])
def test_every_family_has_a_complete_and_a_debug_config(family: str, folder: str) -> None:
    path = CONFIGS / folder / f"{family}.yaml"
    assert path.is_file(), f"write configs/{folder}/{family}.yaml, as its neighbours are"
    config = read_config(path)
    assert config.model.family == family
    given = config.optimizer.model_fields_set
    assert "name" in given and (config.optimizer.relative_step or "lr" in given), "a recipe says its rate"
    if folder == ".":
        assert {"betas", "weight_decay"} <= given or config.optimizer.name == "adafactor"
        assert config.precision.model_fields_set and config.schedule.model_fields_set
        assert config.evaluate.model_fields_set and config.checkpoint.model_fields_set
        assert not config.model.model_fields_set.isdisjoint({"size", "layers"})
    else:
        assert config.train.steps == 20


@pytest.mark.parametrize("step", [0, 100, 3998, 4001, 30000, 99999])
def test_the_transformers_rate_is_its_formula(step: int) -> None:
    """Vaswani et al. 2017, equation 3: d^-0.5 min(n^-0.5, n warmup^-1.5)."""
    n = step + 0.5
    assert rate("transformer", step) == pytest.approx(512**-0.5 * min(n**-0.5, n * 4000**-1.5), rel=1e-4)


@pytest.mark.parametrize("n", [1, 9_999, 10_000, 40_000, 524_288])
def test_t5s_rate_is_its_formula(n: int) -> None:
    """Raffel et al. 2020, section 3.1.2: 1/sqrt(max(n, 10^4)), times the root mean square of the tensor."""
    config = read_config("t5")
    weight = torch.full((4, 6), 0.5)
    optimizer = build_optimizer(config.optimizer, [("blocks.0.mlp.up.weight", weight)])
    assert isinstance(optimizer, Adafactor)
    set_factor(optimizer, Course(config).factor(Position(step=n - 1), 128, 0.0))
    optimizer.state[weight]["step"].fill_(n - 1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    # No first moment, and second ones that were 0: the update is clipped to a mean square of 1.
    moved = (0.5 - weight).square().mean().sqrt().item()
    assert moved == pytest.approx(0.5 / math.sqrt(max(n, 10_000)), rel=1e-3)


@pytest.mark.parametrize(("name", "peak", "full", "ramp"), GPT3)
def test_gpt3_is_its_published_recipe(name: str, peak: float, full: float, ramp: float) -> None:
    """Brown et al. 2020, table 2.1 and appendix B, in tokens."""
    config = read_config(name)
    optimizer, course = config.optimizer, Course(config)
    assert (optimizer.name, optimizer.betas, optimizer.eps) == ("adamw", [0.9, 0.95], 1e-8)
    assert (optimizer.weight_decay, config.train.clip, config.train.tokens) == (0.1, 1.0, 300_000_000_000)

    def at(tokens: float) -> tuple[float, float]:
        """(tokens of a batch, learning rate) after so many."""
        drawn = round(tokens / 2048)
        batch = course.ramp.batch_at(drawn)
        return batch * 2048, optimizer.lr * course.factor(Position(drawn=drawn), batch, 0.0)

    assert at(0)[0] == 32768 and at(1.01 * ramp)[0] == pytest.approx(full, rel=0.01) and at(0.98 * ramp)[0] < full
    assert at(187.5e6)[1] == pytest.approx(peak / 2, rel=0.01) and at(376e6)[1] == pytest.approx(peak, rel=0.01)
    assert at(130.19e9)[1] == pytest.approx(0.55 * peak, rel=0.01), "half of the cosine"
    assert at(250e9)[1] > 0.1 * peak
    assert at(260e9)[1] == pytest.approx(0.1 * peak, rel=1e-3) and at(299e9)[1] == pytest.approx(0.1 * peak)


#: name: (optimizer, rate, betas, eps, decay, warm-up in steps, steps, sequences, their length), of the papers' tables.
PAPERS = {
    "bert": ("adamw", 1e-4, [0.9, 0.999], 1e-6, 0.01, 10_000, 1_000_000, 256, 512),
    "bert-lamb": ("lamb", 6e-3, [0.9, 0.999], 1e-6, 0.01, 2_001, 7_037, 65_536, 128),
    "roberta": ("adamw", 6e-4, [0.9, 0.98], 1e-6, 0.01, 24_000, 500_000, 8_000, 512),
    "albert": ("lamb", 1.76e-3, [0.9, 0.999], 1e-6, 0.01, 3_125, 125_000, 4_096, 512),
    "deberta": ("adamw", 2e-4, [0.9, 0.999], 1e-6, 0.01, 10_000, 1_000_000, 2_048, 512),
    "electra": ("adamw", 2e-4, [0.9, 0.999], 1e-6, 0.01, 10_000, 766_000, 256, 512),
    "xlnet": ("adamw", 4e-4, [0.9, 0.999], 1e-6, 0.01, 40_000, 500_000, 8_192, 512),
    "bart": ("adamw", 4e-4, [0.9, 0.98], 1e-6, 0.01, 30_000, 500_000, 8_000, 512),
}


@pytest.mark.parametrize("name", PAPERS)
def test_encoders_have_their_papers_figures(name: str) -> None:
    optimizer, lr, betas, eps, decay, warmup, steps, sequences, length = PAPERS[name]
    config = read_config(name)
    found = config.optimizer
    assert (found.name, found.lr, found.betas, found.eps, found.weight_decay) == (optimizer, lr, betas, eps, decay)
    assert (config.train.steps, config.global_batch(), config.data.sequence_length) == (steps, sequences, length)
    for share, step in ((0.5, warmup // 2), (1.0, warmup), (0.5, (warmup + steps) // 2), (0.0, steps - 1)):
        assert rate(name, step) == pytest.approx(share * lr, abs=2e-3 * lr), f"step {step}: up, then straight to 0"


def test_what_the_papers_predict() -> None:
    """Rates of hidden text, sentences, smoothing."""
    expected = {
        "bert": {"rate": 0.15, "sentence": "next"},
        "roberta": {"rate": 0.15, "sentence": "none"},
        "albert": {"rate": 0.15, "sentence": "order", "ngrams": 3, "whole_words": True},
        "electra": {"rate": 0.15, "weight": 50.0, "mask": 0.85},
        "xlnet": {"context": 6, "longest": 5},
        "t5": {"kind": "spans", "rate": 0.15, "mean": 3.0},
        "bart": {"damage": ["permute", "infill"], "rate": 0.3, "mean": 3.0},
        "transformer": {"smoothing": 0.1},
    }
    for name, fields in expected.items():
        objective = read_config(name).objective.model_dump()
        assert {key: objective[key] for key in fields} == fields, name
    for name in ("bert", "roberta", "deberta", "deberta_v2", "electra", "xlnet", "bart", "transformer", "t5"):
        model = read_config(name).model
        assert (model.embed_dropout, model.residual_dropout) == (0.1, 0.1), f"{name}: dropout 0.1, as all of these"
    assert not read_config("roberta").data.mask_documents, "full sentences cross documents"
    adam = read_config("transformer").optimizer
    assert (adam.name, adam.betas, adam.eps, adam.weight_decay) == ("adam", [0.9, 0.98], 1e-9, 0.0)
