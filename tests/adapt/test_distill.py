"""Distillation: the divergence against its formula in float64, teachers of every kind, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.config import Config, ConfigError, DistillConfig
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.objective import divergence
from shardwright.objective.cross_entropy import Head
from shardwright.objective.distill import TERM, Distilled
from shardwright.objective.divergence import divergence_and_gradient, linear_divergence
from shardwright.objective.heads import Heads
from shardwright.parallel.mesh import World
from shardwright.parallel.proposals import check_layout
from shardwright.train.build import build_corpus, build_loader, build_objective, build_step, fit_to_corpus
from shardwright.train.course import Course
from shardwright.train.layout import build_facts
from shardwright.train.load import load
from shardwright.train.metrics import read_metrics
from shardwright.train.run import train
from shardwright.train.score import evaluate_run
from shardwright.train.teacher import open_teacher
from tests.equivalence.cells import BOUNDS, config, disagreement, weights
from tests.equivalence.work import leg
from tests.ranks import Ranks

Tiny = Callable[..., Config]


@pytest.fixture(scope="session")
def teacher(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned something."""
    run = tmp_path_factory.mktemp("taught") / "teacher"
    train(tiny(run, "train.steps=30", "train.seed=11", "checkpoint.every=null"))
    return run


def taught_by(folder: Path, **keys: object) -> list[str]:
    """Overrides that name a teacher."""
    return [f"distill.{key}={value}" for key, value in {"teacher": folder, **keys}.items()]


# ------------------------------------------------------------------------------------------ the formula


def formula(logits: Tensor, taught: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Sum over rows of w T^2 sum p log(p / q), as it is written."""
    q, p = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (logits, taught))
    return temperature**2 * (weights * (p * torch.log(p / q)).sum(-1)).sum()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    vocab=st.integers(2, 30),
    seed=st.integers(0, 99),
    cap=st.sampled_from([None, 2.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_the_chunked_divergence_is_the_formula(rows, width, vocab, seed, cap, temperature) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ours = [t.requires_grad_() for t in (draw(rows, width), draw(vocab, width), draw(vocab))]
    hidden, weight, bias = draw(rows, width + 1), draw(vocab, width + 1), draw(vocab)
    row_weights = draw(rows).abs()
    before, divergence.CHUNK_ROWS = divergence.CHUNK_ROWS, 7
    try:
        heads = Head(ours[1], ours[2], cap), Head(weight, bias, cap)
        found = linear_divergence(ours[0], heads[0], hidden, heads[1], row_weights, temperature)
        grads = torch.autograd.grad(found * 3, ours)
        with torch.no_grad():
            again = linear_divergence(ours[0], heads[0], hidden, heads[1], row_weights, temperature)
    finally:
        divergence.CHUNK_ROWS = before
    exact = [t.detach().double().requires_grad_() for t in ours]
    logits, taught = exact[0] @ exact[1].T + exact[2], hidden.double() @ weight.double().T + bias.double()
    if cap is not None:
        logits, taught = cap * torch.tanh(logits / cap), cap * torch.tanh(taught / cap)
    wanted = formula(logits, taught, row_weights.double(), temperature)
    assert torch.equal(found.detach(), again) and found >= 0
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for got, expected in zip(grads, torch.autograd.grad(wanted * 3, exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_its_gradient_is_as_large_at_any_temperature() -> None:
    """What T^2 is for (Hinton et al. 2015): in the limit of high temperatures the gradient does not depend on T."""
    logits, taught, one = torch.randn(5, 11).double(), torch.randn(5, 11).double(), torch.ones(()).double()
    hot, hotter = (divergence_and_gradient(logits, taught, torch.ones(5), one, t, None, None)[1] for t in (1e3, 1e4))
    torch.testing.assert_close(hot, hotter, rtol=1e-2, atol=1e-4)
    centred = (logits - logits.mean(-1, keepdim=True)) - (taught - taught.mean(-1, keepdim=True))
    torch.testing.assert_close(hotter, centred / 11, rtol=1e-2, atol=1e-4)


def test_no_batch_of_logits_exists_whole() -> None:
    """Of 8 chunks of rows, one chunk's student and teacher logits at a time."""
    rows, vocab, sizes = 8 * divergence.CHUNK_ROWS, 64, []
    shaped = torch.nn.functional.linear

    def measured(*given: Any) -> Tensor:
        sizes.append(shaped(*given).shape)
        return shaped(*given)

    hidden = torch.randn(rows, 4, requires_grad=True)
    head = Head(torch.randn(vocab, 4, requires_grad=True))
    divergence.F.linear, plain = measured, shaped
    try:
        linear_divergence(hidden, head, torch.randn(rows, 4), Head(torch.randn(vocab, 4)), torch.ones(rows), 2.0)
    finally:
        divergence.F.linear = plain
    assert sizes == [(divergence.CHUNK_ROWS, vocab)] * 16


# ------------------------------------------------------------------------------------------ an objective with a teacher


@pytest.fixture
def alone(tiny: Tiny, tmp_path: Path) -> Iterator[Callable[..., tuple[Config, World, list[dict[str, Tensor]]]]]:
    """`alone("key=value", ...)`: a fitted config, this process, and the micro-batches of its first step."""

    def build(*overrides: str, **model: Any) -> tuple[Config, World, list[dict[str, Tensor]]]:
        made = tiny(tmp_path / "alone", *overrides, **model)
        fit_to_corpus(made, build_corpus(made))
        world = World(device=torch.device("cpu"))
        with build_loader(made, world, Course(made).ramp) as loader:
            loader.start()
            return made, world, next(loader).micro_batches

    yield build


def sums_of(made: Config, world: World, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sums and counts of each term, of the run's first weights."""
    step = build_step(made, world)
    (stage,) = step.stages.models.values()
    stage.begin(torch.zeros((), dtype=torch.int64))
    with torch.no_grad():
        found = stage(batch["input_ids"], **batch)
    return dict(zip(stage.objective.terms, found, strict=True)), stage.objective.count(batch)


def test_both_terms_are_of_the_same_predictions(alone, teacher: Path) -> None:
    made, world, (batch, *_) = alone(*taught_by(teacher, temperature=3.0, weight=0.25))
    sums, counts = sums_of(made, world, batch)
    objective = build_objective(made)
    assert dict(objective.terms) == {"lm": 0.75, TERM: 0.25}
    assert counts["lm"] == counts[TERM] == batch["weights"].sum()
    student = build_model(made.model)
    apply_init(student, made.model, made.train.seed)
    given = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    with torch.no_grad():
        logits, taught = student(**given)["logits"], load(teacher).model(**given)["logits"]
    wanted = formula(logits.double(), taught.double(), batch["weights"].double(), 3.0)
    assert sums[TERM].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_hugging_face_folder_teaches(alone, prepared: Path, tmp_path: Path) -> None:
    """transformers with the same weights is the oracle."""
    transformers = pytest.importorskip("transformers")
    from tests.interop.models import add_tokenizer, save_theirs

    theirs = save_theirs(tmp_path / "theirs", "llama", vocab_size=512)
    add_tokenizer(tmp_path / "theirs", prepared)
    settings = ("data.mask_documents=false", "data.reset_positions=false")
    made, world, (batch, *_) = alone(*taught_by(tmp_path / "theirs"), *settings)
    sums, _ = sums_of(made, world, batch)
    student = build_model(made.model)
    apply_init(student, made.model, made.train.seed)
    with torch.no_grad():
        logits, taught = student(batch["input_ids"])["logits"], theirs(batch["input_ids"]).logits
    wanted = formula(logits.double(), taught.double(), batch["weights"].double(), 2.0)
    assert sums[TERM].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert isinstance(theirs, transformers.PreTrainedModel) and len(made.distill.sha256) == 64


@pytest.mark.parametrize(
    ("family", "objective"),
    [("bert", "masked"), ("deberta_v2", "masked"), ("xlnet", "permuted"), ("t5", "span")],
)
def test_every_kind_of_model_is_taught(alone, tiny: Tiny, tmp_path: Path, family: str, objective: str) -> None:
    """A teacher of the same weights has nothing to say; one of other weights does."""
    keys = [f"objective.name={objective}", "train.steps=1"]
    folders = [tmp_path / "same", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        made = tiny(folder, *keys, f"train.seed={seed}", "optimizer.lr=1e-30", family=family)
        train(made)
    found = []
    for folder in folders:
        made, world, (batch, *_) = alone(*keys, *taught_by(folder), family=family)
        sums, counts = sums_of(made, world, batch)
        found.append((sums[TERM] / counts[TERM]).item())
    assert abs(found[0]) < 1e-6 and found[1] > 1e-4


def test_the_teacher_learns_nothing_and_is_no_part_of_the_model(alone, teacher: Path) -> None:
    made, world, batches = alone(*taught_by(teacher))
    step = build_step(made, world)
    taught = step.stages.objective.teacher
    before = [p.detach().clone() for p in taught.model.parameters()]
    for _ in range(3):
        step.accumulate(batches, torch.zeros((), dtype=torch.int64))
        step.update(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, taught.model.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in taught.model.parameters())
    own = sum(p.numel() for model in step.stages.models.values() for p in model.parameters())
    assert own == sum(p.numel() for p in build_model(made.model).parameters())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp64"])
def test_the_teacher_computes_in_the_runs_format(alone, teacher: Path, precision: str) -> None:
    made, world, (batch, *_) = alone(*taught_by(teacher), f"precision.compute={precision}")
    exact, _, _ = alone(*taught_by(teacher))
    hidden, heads = open_teacher(made.distill, made, world, build_objective(made))(batch)
    assert (
        hidden.dtype
        == heads.vocabulary.weight.dtype
        == {"fp16": torch.half, "bf16": torch.bfloat16}.get(precision, torch.float64)
    )
    sums, counts = sums_of(made, world, batch)
    wanted, _ = sums_of(exact, world, batch)
    assert (sums[TERM] / counts[TERM]).item() == pytest.approx((wanted[TERM] / counts[TERM]).item(), rel=2e-2)


# ------------------------------------------------------------------------------------------ runs


def test_the_teachers_own_loss_is_the_floor(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    """A student that begins as the teacher has no divergence, and its loss; one that learns from it comes closer."""
    floor = evaluate_run(teacher)["val_loss"]
    same = tiny(tmp_path / "same", *taught_by(teacher), "train.steps=1", "optimizer.lr=1e-30", f"begin={teacher}")
    train(same)
    last = read_metrics(Path(same.run))[-1]
    assert last["val_teacher_loss"] == pytest.approx(0, abs=1e-6)
    assert last["val_lm_loss"] == pytest.approx(floor, rel=1e-6)
    pure = tiny(tmp_path / "pure", *taught_by(teacher, weight=1.0), "train.steps=40", "evaluate.every=20")
    train(pure)
    evaluations = [r for r in read_metrics(Path(pure.run)) if "val_loss" in r]
    assert evaluations[-1]["val_teacher_loss"] < evaluations[0]["val_teacher_loss"]
    assert evaluations[-1]["val_loss"] == pytest.approx(evaluations[-1]["val_teacher_loss"])
    assert evaluations[-1]["val_lm_loss"] < math.log(512) - 0.5, "it has learned the text from the teacher alone"
    # Its figures can be had without the teacher.
    assert evaluate_run(pure.run)["val_loss"] == pytest.approx(evaluations[-1]["val_lm_loss"], rel=1e-5)


@pytest.mark.parametrize("settings", [(), ("precision.compute=fp16", "model.residual_dropout=0.1")])
def test_a_resumed_run_is_bit_identical(tiny: Tiny, teacher: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    given = [*taught_by(teacher), *settings]
    train(tiny(tmp_path / "whole", *given))
    leg(tiny(tmp_path / "parts", *given).model_dump(), [], 4)
    train(tiny(tmp_path / "parts", *given))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_another_teacher_does_not_go_on(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", *taught_by(teacher), "train.steps=2"))
    other = tmp_path / "other"
    train(tiny(other, "train.steps=1"))
    with pytest.raises(ConfigError, match=r"distill.sha256 is \w+ there and \w+ here"):
        train(tiny(tmp_path / "run", *taught_by(other), "train.steps=2"))
    with pytest.raises(ConfigError, match="distill is|distill.teacher is|distill.sha256 is"):
        train(tiny(tmp_path / "run", "train.steps=2"))
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    train(tiny(tmp_path / "run", *taught_by(moved), "train.steps=2"))  # the same teacher from elsewhere


def test_what_does_not_fit_is_refused(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    def refused(reason: str, *overrides: str, **model: Any) -> None:
        made = tiny(tmp_path / "run", *overrides, **model)
        with pytest.raises(ConfigError, match=reason) as raised:
            fit_to_corpus(made, build_corpus(made))
        assert "\n" not in str(raised.value)

    given = taught_by(teacher)
    refused("knows 512 tokens and the model 520; .* model.vocab_size=512", *given, "model.vocab_size=520")
    refused("is a decoder, and model.family=bert a encoder|knows", *given, "objective.name=masked", family="bert")
    refused("neither a run folder nor", *taught_by(tmp_path / "nothing"))
    refused("distill.sha256: names 000000000000", *given, f"distill.sha256={'0' * 64}")
    refused("data.sequence_length=128: .* lower it to 64", *given, "data.sequence_length=128", max_length=128)
    electra = {"family": "electra", "generator_width": 16, "generator_heads": 2}
    refused("objective.name=replaced makes none", *given, "objective.name=replaced", **electra)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    text = (other / "config.yaml").read_text()
    made = tiny(tmp_path / "run")
    fit_to_corpus(made, build_corpus(made))
    (other / "config.yaml").write_text(text.replace(made.data.tokenizer, "f" * 64))
    refused("is not the tokenizer of the training", *taught_by(other))


def test_special_tokens_mean_the_same_to_both(tiny: Tiny, tmp_path: Path) -> None:
    masked = ("objective.name=masked", "train.steps=1")
    train(tiny(tmp_path / "teacher", *masked, family="bert"))
    swapped = "objective.special_tokens={mask: 513, cls: 512, sep: 514, pad: 515}"
    made = tiny(tmp_path / "run", *masked, *taught_by(tmp_path / "teacher"), swapped, family="bert")
    with pytest.raises(ConfigError, match="has id 512 for the special token 'mask', the run 513; set objective.specia"):
        fit_to_corpus(made, build_corpus(made))


def test_layouts_that_would_part_it_are_refused(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    made = tiny(tmp_path / "run", *taught_by(teacher), "parallel.tensor=2")
    with pytest.raises(ConfigError, match="distill: every rank asks a whole teacher"):
        check_layout(build_facts(made, 2))


@pytest.mark.parametrize("layout", ["zero=0", "zero=1", "zero=2", "zero=3"])
def test_a_layout_changes_nothing(ranks: Ranks, prepared: Path, tmp_path: Path, layout: str) -> None:
    """Two ranks against one process, within the bounds of the equivalence matrix; the teacher is another family's."""
    folder = tmp_path / "teacher"
    short = ["train.steps=5", "train.seed=9", "schedule.warmup_steps=1"]
    work = "tests.equivalence.matrix:train_quietly"
    ranks.run(1, work, config(prepared, folder, "llama"), short, None)
    given = [*taught_by(folder), "train.clip=0.2", "evaluate.every=10"]
    expected = ranks.run(1, work, config(prepared, tmp_path / "one"), given, None)[0]
    spread = [*given, f"parallel.{layout}"]
    records = ranks.run(2, work, config(prepared, tmp_path / "two"), spread, None)[0]
    found = disagreement(tmp_path / "two", records, tmp_path / "one", expected)
    assert all(value < BOUNDS["fp32"][name] for name, value in found.items()), found


def test_terms_are_those_of_the_objective_and_the_teachers() -> None:
    """Weights: the labels get what the teacher leaves; other terms keep theirs."""
    from shardwright.objective.masked import Masked, MaskedConfig
    from shardwright.objective.setting import Setting

    inner = Masked(MaskedConfig(name="masked", sentence="next"), Setting(32))
    taught = Distilled(inner, DistillConfig(teacher="x", weight=0.4))
    assert dict(taught.terms) == {"masked": 0.6, "sentence": 1.0, TERM: 0.4}
    assert taught.neighbours and taught.marks == inner.marks and taught.stride(32) == inner.stride(32)
    assert isinstance(Heads(None), tuple)
