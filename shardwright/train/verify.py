"""`shardwright verify`: the first steps of a run under its layout, compared with the same steps in one process.

Beside run.py, on top of what build.py builds; keeps nothing of a run. Rank 0 first runs the steps alone and leaves the
gradients and weights of each in checkpoints, by logical name. Then all ranks run them under the layout, and each
compares what it holds with the same parts of what it reads there: nothing is gathered, a few numbers a tensor travel.
compare.py has the figures and their bounds.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwright.checkpoint import load, save, step_name
from shardwright.checkpoint.ranks import Ranks, open_ranks
from shardwright.config import Config, ConfigError, ParallelConfig
from shardwright.hardware import device_name, versions
from shardwright.log import get_logger, progress
from shardwright.model.families import build_model
from shardwright.parallel.logical import Logical
from shardwright.parallel.mesh import World, join_world, world_size
from shardwright.parallel.peers import watch_peers
from shardwright.parallel.precision import Masters
from shardwright.parallel.proposals import check_layout
from shardwright.parallel.refusals import layout_warnings
from shardwright.parallel.zero import ShardedMasters
from shardwright.train.build import build_corpus, build_loader, build_step, fit_to_corpus
from shardwright.train.compare import BOUNDS, Bounds, Figure, Kind, Pair, Report, StepReport, judged
from shardwright.train.course import Course
from shardwright.train.engines import check_engine
from shardwright.train.layout import build_facts
from shardwright.train.optim import Muon
from shardwright.train.optim.apex import check_apex
from shardwright.train.position import Position
from shardwright.train.signals import lingering
from shardwright.train.step import GivesCopies, Outcome, Step
from shardwright.train.writing import writing

FORMATS = ("fp32", "fp64", "config")
BUDGET_STEPS = 1000  # where a run is as long as the clock says, its schedule is that of so many steps
TRIES = 32  # fp16: a step that overflows is taken again at a lower loss scale


def verify(
    config: Config,
    *,
    steps: int = 3,
    number_format: str = "fp32",
    tell: Callable[[Report], None] | None = None,
) -> Report:
    """Run `steps` steps of a run under its layout, and compare them with the same in one process.

    Both in `number_format`; with `config` in the config's own. Every rank of the world has to call this and gets the
    report; `tell` is called with it on rank 0 before any rank returns. ConfigError where the layout is refused or the
    format is none of FORMATS.
    """
    corpus = build_corpus(config)
    fit_to_corpus(config, corpus)
    alone, spread = comparable(config, number_format)
    facts = build_facts(spread, world_size())
    check_layout(facts)
    check_engine(spread)
    check_apex(spread)
    steps, bounds = min(steps, Course(spread).steps or steps), BOUNDS[spread.precision.compute]
    begin = time.monotonic()
    with (
        join_world(spread.train.device, spread.train.threads, spread.parallel) as world,
        lingering(world.size),
        watch_peers(world),
        open_ranks() as ranks,
        progress(steps * (3 if spread.train.deterministic else 2), "steps", "one process") as bar,
    ):
        layout = "this process" if world.size == 1 else world.describe(spread.parallel)
        with _shared_folder(config, ranks) as folder:
            oracle = partial(_run_alone, alone, world.device, steps, folder, bounds, bar.advance)
            while_rank_0(ranks, "running one process", oracle)
            _forget()
            bar.describe(layout)
            trial = Trial(spread, world, ranks, bounds)
            found = trial.run(steps, bar.advance, folder)
        repeat = None
        if spread.train.deterministic:
            again = Trial(spread, world, ranks, bounds)
            again.run(steps, bar.advance)
            repeat = _first_change(trial, again, ranks)
        report = Report(
            config=spread.model_dump(mode="json"),
            layout=layout,
            processes=world.size,
            device=device_name(world.device),
            number_format=spread.precision.compute,
            against=alone.precision.compute,
            bounds=bounds,
            steps=tuple(found),
            repeat=repeat,
            retries=trial.retries,
            warnings=tuple(layout_warnings(facts)),
            versions=versions(("torch", "numpy")),
            seconds=time.monotonic() - begin,
        )
        ranks.together("writing the report", partial(tell, report) if tell and world.leads else None)
    return report


# ------------------------------------------------------------------------------------------ what is compared


def comparable(config: Config, number_format: str) -> tuple[Config, Config]:
    """(of one process, of the layout): the config as both run it."""
    if number_format not in FORMATS:
        raise ConfigError(f"--format={number_format}: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    wanted = config.precision.compute if number_format == "config" else number_format
    if number_format == "fp64" and config.engine != "native":
        raise ConfigError(
            f"--format=fp64: engine={config.engine} has no float64; nearest that works: --format=fp32, which holds "
            "it against one process in float32, or --format=fp64 with engine=native"
        )
    train = config.train
    changed: dict[str, object] = {"compile": train.compile is True}  # where the config asks for it, not by itself
    if train.budget is not None:
        changed |= {"budget": None, "steps": BUDGET_STEPS}
    alone, spread = (
        config.model_copy(
            update={
                "train": train.model_copy(update=changed),
                "precision": config.precision.model_copy(update={"compute": wanted}),
                "parallel": parallel,
                "engine": engine,
            },
            deep=True,
        )
        for parallel, engine in ((ParallelConfig(), "native"), (config.parallel, config.engine))
    )
    return alone, spread


def logical_names(config: Config) -> list[str]:
    """Every weight's name, in the order of the forward pass."""
    with torch.device("meta"):
        return [name for name, _ in build_model(config.model).named_parameters()]  # type: ignore[arg-type]


class Held(NamedTuple):
    """What this rank has of one weight: `local`, with its `.grad`. `counts`: it is no copy of another stage's."""

    logical: Logical
    local: Tensor
    counts: bool

    def value(self, kind: Kind) -> Tensor:
        """The part of the gradient or weight."""
        return self.local if kind == "weight" else _gradient(self.local)


class Copied(Held):
    """A `Held` of an engine: `local` is a copy of the gradient or weight that was asked for."""

    def value(self, kind: Kind) -> Tensor:
        """The copy."""
        return self.local


def held_parts(step: Step, kind: Kind) -> dict[str, Held]:
    """This rank's part of every weight by logical name; an engine gives copies of `kind`, and all ranks have to ask."""
    masters = step.masters
    if isinstance(masters, GivesCopies):
        return {name: Copied(*part, counts=True) for name, part in masters.copies(kind).items()}
    if not isinstance(masters, ShardedMasters):
        assert isinstance(masters, Masters)
        return {name: Held(Logical.whole(part), part, True) for name, part in masters.parts.items()}
    return {
        name: Held(masters.logical[name], part, name not in masters.uncounted) for name, part in masters.parts.items()
    }


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


# ------------------------------------------------------------------------------------------ the steps


class Walk:
    """The first steps of a run, shown after their backward passes and after their updates."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.course = config, world, Course(config)
        self.step = build_step(config, world)
        optimizer = self.step.optimizer
        if isinstance(optimizer, Muon) and config.precision.compute in ("fp32", "fp64"):
            optimizer.matmul_dtype = self.step.scaler.scale.dtype
        self.retries = 0

    def steps(self, count: int) -> Iterator[tuple[int, Kind, Outcome | None]]:
        """(number, what is there to be seen, the outcome once it is known) `count` times, twice a step."""
        position = Position()
        with build_loader(self.config, self.world, self.course.ramp) as loader:
            for batch in loader.start():
                self._accumulate(batch.micro_batches, position.step)
                yield position.step + 1, "gradient", None
                numbers = self.step.update(self.course.factor(position, batch.count, 0.0))
                yield position.step + 1, "weight", Outcome.read(numbers.tolist())
                position.step += 1
                position.drawn += batch.count
                if position.step == count:
                    return

    def _accumulate(self, batches: list[dict[str, Tensor]], number: int) -> None:
        """All gradients of a step; in fp16 once more at half the scale, while they overflow."""
        scaler = self.step.scaler
        for _ in range(TRIES):
            torch.manual_seed((self.config.train.seed * 1_000_003 + number) % 2**63)  # as run.py does
            self.step.accumulate(batches, torch.full((), number, dtype=torch.int64, device=self.world.device))
            square = self.world.sum(self.step.masters.grad_square(scaler.scale)) if scaler.enabled else None
            if square is None or bool(torch.isfinite(square)):
                return
            scaler.update(torch.ones_like(square, dtype=torch.bool))
            self.retries += 1


def _run_alone(
    config: Config,
    device: torch.device,
    steps: int,
    folder: Path,
    bounds: Bounds,
    advance: Callable[[], None],
    beat: Callable[[], None],
) -> None:
    """The steps in one process; `folder` gets the gradients and weights of each, and what to measure them against.

    `beat` is called now and then.
    """
    walk = Walk(config, World(device=device))
    walk.step.stages.models[0].register_forward_pre_hook(lambda *_: beat())
    weights = {name: part.local for name, part in held_parts(walk.step, "weight").items()}
    start = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    for number, kind, outcome in walk.steps(steps):
        if kind == "gradient":
            scale = float(walk.step.scaler.scale)
            tensors = {name: _gradient(weight) / scale for name, weight in weights.items()}
            sizes = {name: float(gradient.double().norm()) for name, gradient in tensors.items()}
        else:
            tensors = dict(weights)
            sizes = {name: _distance(weight.cpu(), start[name], bounds.weight) for name, weight in weights.items()}
            advance()
        state = {"sizes": sizes, "outcome": None if outcome is None else list(outcome[:2])}
        save(folder / kind, tensors, state, step=number, alone=True)
        beat()


def _distance(weight: Tensor, start: Tensor, bound: float) -> float:
    """How far a weight has moved (2-norm), and so much more that the bound leaves room for its own last digit."""
    digit = torch.finfo(weight.dtype).eps * float(weight.double().norm())
    return float((weight.double() - start.double()).norm()) + digit / bound


class Trial:
    """The steps under the layout, on this rank."""

    def __init__(self, config: Config, world: World, ranks: Ranks, bounds: Bounds) -> None:
        self.config, self.world, self.ranks, self.bounds = config, world, ranks, bounds
        self.names = logical_names(config)
        self.digests: dict[tuple[int, Kind], dict[str, bytes]] = {}
        self.tiny: set[str] = set()
        self.retries = 0

    def run(self, count: int, advance: Callable[[], None], folder: Path | None = None) -> list[StepReport]:
        """Walk, and compare with what one process left in `folder`, where there is one."""
        walk = Walk(self.config, self.world)
        reports: list[StepReport] = []
        gradients: tuple[Figure, ...] = ()
        for number, kind, outcome in walk.steps(count):
            scale = float(walk.step.scaler.scale) if kind == "gradient" else 1.0
            held = held_parts(walk.step, kind)
            if self.config.train.deterministic:
                self.digests[number, kind] = {name: _digest(part.value(kind)) for name, part in held.items()}
            if folder is not None:
                figures, state = self._compare(folder, held, number, kind, scale)
                if outcome is None:
                    gradients = figures
                else:
                    loss, norm = (Pair(*pair) for pair in zip(state["outcome"], outcome[:2], strict=True))
                    reports.append(StepReport(number, loss, norm, gradients, figures))
            if kind == "weight":
                advance()
        self.retries = walk.retries
        return reports

    def _compare(
        self, folder: Path, held: Mapping[str, Held], number: int, kind: Kind, scale: float
    ) -> tuple[tuple[Figure, ...], dict[str, Any]]:
        """Figures of every tensor, the same on all ranks, and what one process left beside the tensors."""
        expected = {name: torch.empty_like(part.local) for name, part in held.items()}
        targets = {name: held[name].logical.wrap(local) for name, local in expected.items()}
        with _quiet_loading():
            state = load(folder / kind / step_name(number), targets, group=self.ranks.group)
        largest = torch.zeros(len(self.names), dtype=torch.float64)
        squares = torch.zeros(2, len(self.names), dtype=torch.float64)  # of the weights, of copies of tied ones
        for i, name in enumerate(self.names):
            if name in held and held[name].local.numel():
                difference = _difference(held[name].value(kind), expected[name], scale)
                largest[i] = difference.amax()
                row = 0 if held[name].counts else 1
                squares[row, i] = difference.square().sum() / held[name].logical.copies
        self.ranks.union(largest)
        norms = self.world.sum(squares).amax(0).sqrt()
        sizes = [state["sizes"][name] for name in self.names]
        rows = list(zip(self.names, largest.tolist(), norms.tolist(), sizes, strict=True))
        return judged(kind, number, rows, self.bounds, self.tiny), state


def _difference(found: Tensor, expected: Tensor, scale: float) -> Tensor:
    """Absolute differences in float64; what is not finite is infinitely far off."""
    difference = (found.detach().double() / scale - expected.double()).abs()
    return torch.nan_to_num(difference, nan=math.inf, posinf=math.inf)


def _digest(part: Tensor) -> bytes:
    raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).digest()


def _first_change(one: Trial, two: Trial, ranks: Ranks) -> str:
    """What first differs in any bit between two runs of one layout, on any rank; empty where nothing does."""
    keys = list(one.digests)
    changed = torch.zeros(len(keys), len(one.names), dtype=torch.int32)
    for row, key in enumerate(keys):
        for column, name in enumerate(one.names):
            changed[row, column] = one.digests[key].get(name) != two.digests[key].get(name)
    ranks.union(changed)
    for row, column in changed.nonzero().tolist()[:1]:
        number, kind = keys[row]
        return f"{kind} {one.names[column]} at step {number}"
    return ""


# ------------------------------------------------------------------------------------------ around them


def while_rank_0(ranks: Ranks, doing: str, work: Callable[[Callable[[], None]], None]) -> None:
    """Have rank 0 do `work` alone, however long it takes; it is handed a function to call now and then.

    Each call is a sign of life to the other ranks, so that none of them waits longer than from one to the next.
    """

    def beat(busy: int = 1) -> None:
        ranks.union(torch.tensor([busy], dtype=torch.int32))

    def lead() -> None:
        try:
            work(beat)
        finally:
            beat(0)

    while ranks.rank and int(ranks.union(torch.zeros(1, dtype=torch.int32))):
        pass
    ranks.together(doing, None if ranks.rank else lead)


@contextmanager
def _shared_folder(config: Config, ranks: Ranks) -> Iterator[Path]:
    """A folder beside the run's, on storage that all ranks see; it goes at the end, also at Ctrl-C and SIGTERM."""
    run = Path(config.run or "run")

    def make() -> str:
        with writing(run.parent):
            run.parent.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix=f".{run.name}.verify.", dir=run.parent)

    folder = ranks.together("making a folder", None if ranks.rank else make)
    try:
        with _leaving_in_order():
            yield Path(ranks.share(folder or ""))
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Within, SIGTERM is an exception, as Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the line that each load writes."""
    log = get_logger()
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)


def _forget() -> None:
    """Give back the memory of one process' run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
