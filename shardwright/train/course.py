"""The course of a run: how long it is, where it stands, and the learning-rate factor and batch there.

Joins the pure functions of schedule.py to a `Position`; reads no clock.
"""

from __future__ import annotations

from shardwright.config import Config
from shardwright.train.position import Position
from shardwright.train.schedule import build_progress, build_ramp, build_schedule, resolve_warmup


class Course:
    """Progress, learning rate and global batch of one config."""

    def __init__(self, config: Config) -> None:
        self.length = config.data.sequence_length
        self.ramp = build_ramp(config.batch, config.global_batch())
        self.progress = build_progress(config.train)
        self.steps = self._steps(config)
        warmup = resolve_warmup(config.schedule, self.progress, self.ramp, self.length)
        self._schedule = build_schedule(config.schedule, warmup)

    def _steps(self, config: Config) -> int | None:
        """Steps of the whole run, where they are known beforehand."""
        if config.train.tokens is not None:
            return self.ramp.steps_to(-(-config.train.tokens // self.length))
        return config.train.steps

    def tokens(self, position: Position) -> int:
        """Tokens of the sequences drawn so far."""
        return position.drawn * self.length

    def is_done(self, position: Position, step_seconds: float) -> bool:
        """Whether no further step is due."""
        return self.progress.is_done(self._consumed(position), step_seconds)

    def share(self, position: Position) -> float:
        """How much of the run is done, 0..1."""
        return min(self._consumed(position) / self.progress.total, 1.0)

    def factor(self, position: Position, count: int, step_seconds: float) -> float:
        """The learning-rate factor of the next step, which takes `count` sequences."""
        if self.progress.unit == "steps":
            return self._schedule(self.progress.at_step(position.step))
        if self.progress.unit == "tokens":
            return self._schedule(self.progress.at_tokens(self.tokens(position), count * self.length))
        return self._schedule(self.progress.at_clock(position.step, position.elapsed, step_seconds, position.startup))

    def _consumed(self, position: Position) -> float:
        of = {"steps": position.step, "tokens": self.tokens(position), "seconds": position.elapsed}
        return of[self.progress.unit]
