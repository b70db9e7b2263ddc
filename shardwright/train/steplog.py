"""What a run writes of its start and steps: losses, rates since the line before, memory, energy, evaluations.

Between run.py, which knows when a line is due, and metrics.py, which writes it.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import torch

from shardwright.config import Config
from shardwright.hardware import EnergyMeter, device_name, known_peak, measured_peak, versions
from shardwright.log import get_logger
from shardwright.model.count import num_flops, num_parameters
from shardwright.parallel.mesh import World
from shardwright.parallel.precision import FORMATS
from shardwright.train.course import Course
from shardwright.train.layout import predicted_share, row_lengths
from shardwright.train.metrics import MetricsLog, Utilisation, record_start
from shardwright.train.position import Position
from shardwright.train.preview import batch_equation
from shardwright.train.step import Outcome


class StepLog:
    """The log of one start of a run; open it before the first line."""

    def __init__(self, config: Config, world: World, course: Course, folder: Path) -> None:
        self.config, self.world, self.course, self.folder = config, world, course, folder
        self.energy = EnergyMeter(world.device)
        self.utilisation = _utilisation(config, world, course)
        self.data_seconds = 0.0  # waited for the loader since the line before
        self.step = 0  # of the line before
        self._at, self._tokens = time.monotonic(), 0

    def open(self, step: int) -> None:
        """Go on after `step`: lines of later steps are taken away."""
        self._metrics = MetricsLog(
            self.folder,
            step,
            total_steps=self.course.steps,
            tensorboard=self.config.log.tensorboard,
            wandb=self.config.log.wandb,
            config=self.config.model_dump(mode="json"),
            write=self.world.leads,
        )

    def introduce(self, step: int) -> None:
        """What starts after `step`, and on what: to the log, and as a line of starts.jsonl."""
        log, world = get_logger(), self.world
        parameters = num_parameters(self.config.model)["total"]  # type: ignore[arg-type]
        name, utilisation = device_name(world.device), self.utilisation.describe()
        log.info("%s on %s: %s parameters; %s", self.folder, name, f"{parameters:,}", utilisation)
        if world.size > 1:
            equation = batch_equation(self.config, world.degree("data"))
            log.info("%d processes, %s; %s", world.size, world.describe(), equation)
        if world.leads:
            record_start(
                self.folder,
                step,
                parameters=parameters,
                device=name,
                num_devices=world.size,
                layout=world.describe(),
                mfu_basis=utilisation,
                versions=versions(("torch", "numpy", "shardwright")),
            )

    def close(self) -> None:
        """End what `open` began."""
        self._metrics.close()

    def mark(self, position: Position) -> None:
        """Rates of the next line count from here."""
        self._at, self.step = time.monotonic(), position.step
        self._tokens, self.data_seconds = self.course.tokens(position), 0.0

    def pause(self, seconds: float) -> None:
        """Leave a pause, such as an evaluation, out of the next line's rates."""
        self._at += seconds

    def advance(self, position: Position) -> None:
        """Move the progress bar."""
        self._metrics.advance(position.step, self.course.share(position))

    def write(self, position: Position, outcome: Outcome, lr_factor: float) -> None:
        """The line of the step just done."""
        now, steps = time.monotonic(), max(position.step - self.step, 1)
        rate = (self.course.tokens(position) - self._tokens) / max(now - self._at, 1e-9)
        fields: dict[str, float | int | None] = {
            "tokens": self.course.tokens(position),
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "lr": self.config.optimizer.lr * lr_factor,
            "loss_scale": outcome.loss_scale,
            "tokens_per_s": rate,
            "mfu": self.utilisation.mfu(rate),
            "step_s": (now - self._at) / steps,
            "data_s": self.data_seconds / steps,
            "mem_gib": self._memory_gib(),
            "progress": self.course.share(position),
        }
        if (energy := self.energy.kwh()) is not None:
            fields["energy_kwh"] = energy
        self._metrics.log(position.step, {k: v for k, v in fields.items() if v is not None or k == "mfu"})
        self.mark(position)

    def write_figures(self, step: int, figures: dict[str, float]) -> None:
        """The line of an evaluation."""
        self._metrics.log(step, figures)

    def _memory_gib(self) -> float:
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device) / 2**30
        return psutil.Process().memory_info().rss / 2**30


def _utilisation(config: Config, world: World, course: Course) -> Utilisation:
    device, compute = world.device, FORMATS[config.precision.compute]
    peak = known_peak(device, compute)
    if peak is None and config.log.measure_peak:
        peak = measured_peak(device, compute)
    target, rows, share = row_lengths(config)[1], config.batch.micro, predicted_share(config)
    flops = num_flops(config.model, course.length, target=target, rows=rows, predicted=share)  # type: ignore[arg-type]
    return Utilisation(flops.model, peak, world.size)
