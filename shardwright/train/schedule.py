"""Where a run stands, and what follows from it: progress 0..1, the learning-rate factor, the global batch.

All are pure functions of what the run has consumed (steps, tokens or, under a wall-clock budget, a recorded
trace of positions), so that resuming is evaluating them again. Nothing here reads a clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shardwright.config import BatchConfig, ConfigError, ScheduleConfig, TrainConfig, parse_duration

Schedule = Callable[[float], float]
Unit = Literal["steps", "tokens", "seconds"]

_FIRST = 1 / 2000  # least position under a budget: the middle of the first step, if there were a thousand


def build_schedule(config: ScheduleConfig, warmup: float | None = None) -> Schedule:
    """The learning-rate factor (0..1 of the peak) as a function of progress 0..1.

    warmup: fraction of the run that rises linearly from `config.start`; None takes `config.warmup`. After it, t the
    share done of what is left until `config.end`, f the floor: cosine f + (1-f)(1+cos(pi t))/2; linear f + (1-f)(1-t);
    inverse_sqrt max(f, sqrt(warmup / progress)) (Vaswani et al. 2017); wsd 1, then down to f over the last
    `decay` of the run (Hu et al. 2024; shape sqrt is Hagele et al. 2024's 1 - sqrt); constant 1.
    """
    rise = config.warmup if warmup is None else warmup
    _check(config, rise)
    shapes: dict[str, Schedule] = {
        "cosine": lambda p: _fall(_share(p, rise, config.end), "cosine", config.floor),
        "linear": lambda p: _fall(_share(p, rise, config.end), "linear", config.floor),
        "wsd": lambda p: _fall(_share(p, 1.0 - config.decay, 1.0), config.decay_shape, config.floor),
        "inverse_sqrt": lambda p: max(config.floor, math.sqrt(rise / p)),
        "constant": lambda p: 1.0,
    }
    after = shapes[config.name]

    def schedule(progress: float) -> float:
        p = min(max(progress, 0.0), 1.0)
        return config.start + (1 - config.start) * p / rise if p < rise else after(p)

    return schedule


def _check(config: ScheduleConfig, rise: float) -> None:
    if not 0.0 <= rise <= 1.0:
        raise ConfigError(f"schedule.warmup: comes to {rise:.3g} of the run; expected 0 to 1, shorten it")
    if config.name == "inverse_sqrt" and rise == 0.0:
        raise ConfigError("schedule.warmup=0: inverse_sqrt is scaled by its warm-up; give one, for example 0.02")
    if config.name in ("cosine", "linear") and config.end < 1.0 and rise >= config.end:
        raise ConfigError(
            f"schedule.end={config.end}: lies in the warm-up, which lasts {rise:.3g} of the run; raise it"
        )
    if config.name == "wsd" and rise + config.decay > 1.0 + 1e-9:
        raise ConfigError(
            f"schedule.decay={config.decay}: with a warm-up of {rise:.3g} of the run it is longer than the run; "
            f"at most {1.0 - rise:.3g}"
        )


def _share(progress: float, start: float, stop: float) -> float:
    """How much of [start, stop] lies behind `progress`, 0..1."""
    if progress <= start:
        return 0.0
    return min((progress - start) / (stop - start), 1.0)


def _fall(t: float, shape: str, floor: float) -> float:
    """From 1 at t=0 to the floor at t=1."""
    left = {"linear": 1.0 - t, "cosine": 0.5 * (1.0 + math.cos(math.pi * t)), "sqrt": 1.0 - math.sqrt(t)}[shape]
    return floor + (1.0 - floor) * left


def resolve_warmup(config: ScheduleConfig, progress: Progress, ramp: BatchRamp, length: int) -> float:
    """The warm-up as a fraction of the run, whose sequences have `length` tokens.

    Given in the other unit than the run's length, it is turned into that by way of the ramp. ConfigError where both
    absolute forms are given, or one that a wall-clock budget cannot turn into a share.
    """
    given = {"warmup_steps": config.warmup_steps, "warmup_tokens": config.warmup_tokens}
    named = {key: value for key, value in given.items() if value is not None}
    if not named:
        return config.warmup
    if len(named) > 1:
        raise ConfigError("schedule.warmup_steps and schedule.warmup_tokens: give one of them")
    ((key, value),) = named.items()
    if progress.unit == "seconds":
        raise ConfigError(f"schedule.{key}={value}: the length of a run with a budget is unknown; use schedule.warmup")
    rise: float = value
    if key == "warmup_steps" and progress.unit == "tokens":
        rise = ramp.drawn_after(value) * length
    elif key == "warmup_tokens" and progress.unit == "steps":
        rise = ramp.steps_within(value / length)
    if rise > progress.total:
        raise ConfigError(
            f"schedule.{key}={value}: is longer than the run of {progress.total:g} {progress.unit}; shorten it"
        )
    return rise / progress.total


@dataclass
class Progress:
    """Where a run stands, 0..1, in the unit in which its length was given.

    A step is placed at the middle of the stretch that it covers, so that neither the first nor the last one
    is spent at a learning rate of 0. In seconds, position i of `trace` is that of step i: a position already
    there is replayed and the clock ignored; a new one is taken from the elapsed time and recorded.
    """

    unit: Unit
    total: float
    trace: list[float]

    def at_step(self, step: int) -> float:
        """Position of 0-based step `step` of a run measured in steps."""
        assert self.unit == "steps"
        return min((step + 0.5) / self.total, 1.0)

    def at_tokens(self, consumed: int, batch: int) -> float:
        """Position of the step that takes `batch` tokens after `consumed`."""
        assert self.unit == "tokens"
        return min((consumed + 0.5 * batch) / self.total, 1.0)

    def at_clock(self, step: int, elapsed: float | None, step_seconds: float = 0.0, startup: float = 0.0) -> float:
        """Position of step `step`, which starts `elapsed` seconds into the run and takes about `step_seconds`.

        The first `startup` seconds (building, compiling) are part of the budget, but not of the schedule.
        Until there is a step to go by, `step_seconds` is 0 and the position the least there is, so that no step is
        spent at a rate of 0. Time before a resume counts; the caller reads the clock on one rank and tells the others.
        elapsed=None only replays: ValueError where the trace ends.
        """
        assert self.unit == "seconds"
        if step == len(self.trace) and elapsed is not None:
            latest = self.trace[-1] if self.trace else _FIRST
            position = (elapsed - startup + 0.5 * step_seconds) / max(self.total - startup, 1e-9)
            self.trace.append(max(latest, min(position, 1.0)))
        if step >= len(self.trace):
            raise ValueError(f"train.budget: the recorded trace has {len(self.trace)} steps and no position of {step}")
        return self.trace[step]

    def is_done(self, consumed: float, step_seconds: float = 0.0) -> bool:
        """Whether no further step is due after `consumed` steps, tokens or seconds.

        Under a budget a step is due while its middle lies inside: the end is met to half a step.
        """
        return consumed + (0.5 * step_seconds if self.unit == "seconds" else 0.0) >= self.total

    def rewind(self, step: int) -> None:
        """Forget the positions from step `step` on: they will be taken from the clock again (a roll-back)."""
        del self.trace[step:]

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON; floats come back from it bit for bit."""
        return {"unit": self.unit, "total": self.total, "trace": list(self.trace)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over the trace of a checkpoint; ValueError if the run's length was another."""
        if (state["unit"], state["total"]) != (self.unit, self.total):
            raise ValueError(
                f"the saved run is {state['total']:g} {state['unit']} long, this one {self.total:g} {self.unit}; "
                "resume with the same length, or start a new run folder"
            )
        self.trace = [float(position) for position in state["trace"]]


def build_progress(config: TrainConfig, trace: Sequence[float] = ()) -> Progress:
    """The progress of a run; `trace` replays the positions of an earlier one under a budget."""
    if config.steps is not None:
        return Progress("steps", config.steps, [])
    if config.tokens is not None:
        return Progress("tokens", config.tokens, [])
    assert config.budget is not None
    return Progress("seconds", parse_duration(config.budget), list(trace))


@dataclass(frozen=True)
class BatchRamp:
    """The global batch as a function of the sequences drawn before, by levels: constant size, whole steps.

    steps[i] and drawn[i] are what lies before level i, sizes[i] its global batch; the last level never ends.
    Everything is a search in these, O(log levels), both ways.
    """

    steps: tuple[int, ...]
    drawn: tuple[int, ...]
    sizes: tuple[int, ...]

    def batch_at(self, drawn: int) -> int:
        """Sequences that the step after `drawn` sequences takes."""
        return self.sizes[bisect_right(self.drawn, drawn) - 1]

    def drawn_after(self, steps: int) -> int:
        """Sequences drawn by the first `steps` steps."""
        level = bisect_right(self.steps, steps) - 1
        return self.drawn[level] + (steps - self.steps[level]) * self.sizes[level]

    def steps_to(self, sequences: int) -> int:
        """Fewest steps that draw at least `sequences`; the inverse of `drawn_after` at the end of a step."""
        level = bisect_right(self.drawn, sequences) - 1
        return self.steps[level] - (self.drawn[level] - sequences) // self.sizes[level]

    def steps_within(self, sequences: float) -> float:
        """Steps that draw `sequences`, the last one in part; `drawn_after` turned round, straight inside a step."""
        level = bisect_right(self.drawn, sequences) - 1
        return self.steps[level] + (sequences - self.drawn[level]) / self.sizes[level]

    def step_of(self, drawn: int) -> int:
        """Steps finished once `drawn` sequences were drawn; ValueError inside a step."""
        steps = self.steps_to(drawn)
        if self.drawn_after(steps) != drawn:
            raise ValueError(f"batch.ramp: no step ends after {drawn} drawn sequences; resume with the ramp as saved")
        return steps


def build_ramp(config: BatchConfig, full: int) -> BatchRamp:
    """The ramp to a global batch of `full` sequences; without `config.ramp` it is full from the start.

    Megatron's rule: rises of `increment`, evenly over `ramp.sequences` drawn sequences, the last one cut to
    `full`; a step that crosses a rise keeps its size.
    """
    ramp = config.ramp
    if ramp is None:
        return BatchRamp((0,), (0,), (full,))
    if ramp.start > full:
        raise ConfigError(f"batch.ramp.start={ramp.start}: is above the global batch of {full}; lower it")
    rises = -(-(full - ramp.start) // ramp.increment)
    steps, drawn, sizes = [0], [0], [ramp.start]
    for rise in range(1, rises + 1):
        until = -(-rise * ramp.sequences // rises)  # this many drawn sequences make the rise due
        taken = max(0, -(-(until - drawn[-1]) // sizes[-1]))
        size = min(ramp.start + rise * ramp.increment, full)
        if taken == 0:  # one step crossed several rises
            sizes[-1] = size
            continue
        steps.append(steps[-1] + taken)
        drawn.append(drawn[-1] + taken * sizes[-1])
        sizes.append(size)
    return BatchRamp(tuple(steps), tuple(drawn), tuple(sizes))
