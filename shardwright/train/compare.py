"""What `shardwright verify` finds, as plain data: how far each step and tensor is off, the bounds, and the verdict.

Below verify.py, which measures. A tensor is judged by 2-norms: that of the difference over that of the gradient, or
over how far the weight has moved. The largest single element stands beside it but is not judged: where a gradient is
near zero, Adam makes a whole step of its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["gradient", "weight"]
KINDS: tuple[Kind, ...] = ("gradient", "weight")


class Bounds(NamedTuple):
    """The most that a layout may differ, all relative.

    gradient: at step n it may be sqrt(n) times as much, since every update adds to what was rounded before.
    floor: a gradient below this share of the whole gradient is rounding alone (key biases have none: the softmax does
    not see them). It is measured against that share, and what the optimizer makes of it is not judged.
    """

    loss: float
    grad_norm: float
    gradient: float
    weight: float
    floor: float

    def of(self, kind: Kind, step: int) -> float:
        """That of a tensor at a step."""
        return self.gradient * math.sqrt(step) if kind == "gradient" else self.weight


#: By number format, the layout's and that of the one process beside it. The narrow ones are about three times what
#: tensor parallelism differs, which adds up in another order; biases of norms add up many rounded gradients.
BOUNDS: dict[str, Bounds] = {
    "fp64": Bounds(1e-11, 1e-10, 1e-9, 1e-7, 1e-8),
    "fp32": Bounds(1e-5, 1e-4, 1e-3, 1e-2, 1e-6),
    "fp16": Bounds(1e-4, 2e-3, 4e-2, 0.15, 1e-5),
    "bf16": Bounds(1e-3, 5e-3, 0.3, 0.75, 1e-4),
}


class Pair(NamedTuple):
    """A number of one process and the layout's."""

    alone: float
    spread: float

    @property
    def difference(self) -> float:
        """Relative; infinite where either is not finite."""
        if not (math.isfinite(self.alone) and math.isfinite(self.spread)):
            return math.inf
        return abs(self.spread - self.alone) / max(abs(self.alone), 1e-300)


class Figure(NamedTuple):
    """How far a gradient or weight is off. relative: None where it is not judged."""

    name: str
    relative: float | None
    bound: float
    largest: float  # difference of an element

    @property
    def share(self) -> float:
        """Of the bound; over 1 is out of it."""
        return 0.0 if self.relative is None else self.relative / self.bound


@dataclass(frozen=True)
class StepReport:
    """One step; tensors in the order of the forward pass."""

    step: int
    loss: Pair
    grad_norm: Pair
    gradients: tuple[Figure, ...]
    weights: tuple[Figure, ...]

    def figures(self, kind: Kind) -> tuple[Figure, ...]:
        """Those of gradients or weights."""
        return self.gradients if kind == "gradient" else self.weights

    def worst(self, kind: Kind) -> Figure:
        """The tensor that is furthest off."""
        return max(self.figures(kind), key=lambda figure: figure.share)


class Excess(NamedTuple):
    """A figure that is out of its bound: `what` is loss, gradient norm, gradient or weight."""

    step: int
    what: str
    tensor: str | None
    difference: float
    bound: float

    def __str__(self) -> str:
        off = f"is off by {self.difference:.1e} (bound {self.bound:g})"
        if self.tensor is None:
            return f"step {self.step}: the {self.what} {off}"
        if self.what == "gradient":
            return f"step {self.step}: the gradient of {self.tensor} {off} of its norm"
        return f"step {self.step}: {self.tensor} {off} of how far it has moved"


@dataclass(frozen=True)
class TensorReport:
    """One tensor over all steps: the worst of each kind."""

    name: str
    gradient: Figure
    weight: Figure

    @property
    def share(self) -> float:
        """The larger one of a bound."""
        return max(self.gradient.share, self.weight.share)


@dataclass(frozen=True)
class Report:
    """All of a verification, the same on every rank."""

    config: Mapping[str, Any]
    layout: str
    processes: int
    device: str
    number_format: str  # of the layout
    against: str  # of one process
    bounds: Bounds
    steps: tuple[StepReport, ...]
    repeat: str | None  # what a second run of the layout changed, empty for nothing; None: there was none
    retries: int  # fp16: passes taken again at a lower loss scale
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every figure is within its bound, and a second run changed nothing."""
        return not self.excesses() and not self.repeat

    def excesses(self) -> list[Excess]:
        """What is out of bound, step by step; tensors in the order of the forward pass, gradients first."""
        found: list[Excess] = []
        for step in self.steps:
            for what, pair, bound in (
                ("loss", step.loss, self.bounds.loss),
                ("gradient norm", step.grad_norm, self.bounds.grad_norm),
            ):
                if not pair.difference <= bound:
                    found.append(Excess(step.step, what, None, pair.difference, bound))
            for kind in KINDS:
                out = (figure for figure in step.figures(kind) if figure.share > 1)
                found += [Excess(step.step, kind, f.name, f.relative or 0.0, f.bound) for f in out]
        return found

    def tensors(self) -> list[TensorReport]:
        """Every tensor, the worst first."""
        columns = (zip(*(step.figures(kind) for step in self.steps), strict=True) for kind in KINDS)
        worst = ([max(figures, key=lambda figure: figure.share) for figures in column] for column in columns)
        rows = [TensorReport(gradient.name, gradient, weight) for gradient, weight in zip(*worst, strict=True)]
        return sorted(rows, key=lambda row: -row.share)

    def first(self) -> Excess | None:
        """The first step that is out of bound: there the first tensor, or where none is, the first number."""
        excesses = self.excesses()
        step = excesses[0].step if excesses else 0
        return next(iter(sorted((e for e in excesses if e.step == step), key=lambda e: e.tensor is None)), None)

    def verdict(self) -> str:
        """One sentence; names the first step and tensor that differ."""
        if first := self.first():
            return f"{self.layout} differs from one process: {first}"
        if self.repeat:
            return f"{self.layout} is not deterministic: a second run changed the {self.repeat}"
        return f"{self.layout} does as one process does: every figure is within its bound"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite is null."""
        first = self.first()
        return {
            "passed": self.passed,
            "verdict": self.verdict(),
            "first": None if first is None else {key: _finite(value) for key, value in first._asdict().items()},
            "layout": self.layout,
            "processes": self.processes,
            "device": self.device,
            "format": self.number_format,
            "against": self.against,
            "bounds": self.bounds._asdict(),
            "steps": [_step_dict(step) for step in self.steps],
            "tensors": [_tensor_dict(row) for row in self.tensors()],
            "repeat": self.repeat,
            "retries": self.retries,
            "warnings": list(self.warnings),
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 1),
            "config": self.config,
        }


Row = tuple[str, float, float, float]  # name, largest element and norm of the difference, what it is measured against


def judged(kind: Kind, step: int, rows: Sequence[Row], bounds: Bounds, tiny: set[str]) -> tuple[Figure, ...]:
    """Figures of a step. `tiny` takes in gradients that are rounding alone, by name; their weights are not judged."""
    floor, bound = 0.0, bounds.of(kind, step)
    if kind == "gradient":
        floor = bounds.floor * math.sqrt(sum(size * size for *_, size in rows))
        tiny |= {name for name, _, _, size in rows if not size > floor}
    return tuple(
        Figure(name, None if kind == "weight" and name in tiny else _over(norm, max(size, floor)), bound, largest)
        for name, largest, norm, size in rows
    )


def _over(norm: float, size: float) -> float:
    """norm / size; 0 where nothing differs, infinite where it cannot be said."""
    if norm == 0.0:
        return 0.0
    found = norm / size if size > 0 else math.inf
    return found if math.isfinite(found) else math.inf


def _tensor_dict(row: TensorReport) -> dict[str, Any]:
    numbers = {"gradient": row.gradient.relative, "weight": row.weight.relative, "largest": row.weight.largest}
    return {"name": row.name, **{k: _finite(v) for k, v in numbers.items()}, "share_of_bound": _finite(row.share)}


def _step_dict(step: StepReport) -> dict[str, Any]:
    answer: dict[str, Any] = {"step": step.step}
    for name, pair in (("loss", step.loss), ("grad_norm", step.grad_norm)):
        answer[name] = {"one_process": pair.alone, "layout": pair.spread, "difference": pair.difference}
        answer[name] = {key: _finite(value) for key, value in answer[name].items()}
    for kind in KINDS:
        worst = step.worst(kind)
        answer[kind] = {"tensor": worst.name, "difference": _finite(worst.relative), "largest": _finite(worst.largest)}
    return answer


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
