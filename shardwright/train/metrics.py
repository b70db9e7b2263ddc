"""What a run says about itself: metrics.jsonl, TensorBoard, Weights & Biases, the live line; and MFU.

Room train; used by the loop, on the rank that writes. `metrics.jsonl` is the truth: one strict JSON object a line,
written whole, cut back to the resumed step before a run goes on. The other outputs follow it.
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from shardwright.config import ConfigError
from shardwright.hardware import Peak
from shardwright.log import console, duration, get_logger, is_quiet, quantity
from shardwright.train.events import EventFile, numbers
from shardwright.train.writing import writing

Fields = Mapping[str, float | int | str | None]

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
_BAR = (10, 24)  # least and most characters of the live line's bar

# Fields of a terminal line, in their order, and how each is said.
TRAINING_WORDS: dict[str, Callable[[Any], str]] = {
    "loss": "loss {:.4f}".format,
    "lr": "lr {:.2e}".format,
    "grad_norm": "grad {:.3g}".format,
    "tokens_per_s": lambda rate: f"{quantity(rate)} tokens/s",
    "mfu": "mfu {:.1%}".format,
    "mem_gib": "{:.2f} GiB".format,
}
VALIDATION_WORDS: dict[str, Callable[[Any], str]] = {
    "val_loss": "validation loss {:.4f}".format,
    "val_perplexity": "perplexity {:.4g}".format,
    "val_bits_per_byte": "{:.4f} bits per byte".format,
}


@dataclass(frozen=True)
class Utilisation:
    """Model FLOPs utilisation and its denominator (PaLM, arXiv:2204.02311, appendix B).

    The numerator is the model's own FLOPs, recomputation left out, as `flops_per_token` counts them; the denominator is
    one device's peak times the devices. Without a peak there is no MFU.
    """

    flops_per_token: float
    peak: Peak | None
    num_devices: int = 1

    def mfu(self, tokens_per_s: float) -> float | None:
        """Fraction of the peak at a rate of tokens over all devices."""
        return self.flops_per_token * tokens_per_s / (self.peak.flops * self.num_devices) if self.peak else None

    def describe(self) -> str:
        """Numerator and denominator in one line, for the log and the report."""
        if self.peak is None:
            return "no MFU: the peak of this device is not known; log.measure_peak=true measures one"
        devices = f"{self.num_devices} x " if self.num_devices > 1 else ""
        return f"MFU: {quantity(self.flops_per_token, ' ')}FLOP a token over {devices}{self.peak.basis}"


class MetricsLog:
    """Writes one record a logged step everywhere it is wanted.

    `resume_step` is the number of finished steps that the run goes on from: later records are dropped. `write=False`
    (ranks that do not write) makes every method a no-op.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int = 0,
        *,
        total_steps: int | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        write: bool = True,
    ) -> None:
        self._write = write
        if not write:
            return
        self._path = folder / METRICS
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            truncate(self._path, resume_step)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._tensorboard = EventFile(folder / "tensorboard", read_metrics(folder)) if tensorboard else None
        self._wandb = _open_wandb(wandb, folder, config or {}) if wandb else None
        self._display = _display(resume_step, total_steps)

    def log(self, step: int, fields: Fields) -> None:
        """Record step `step` (1 is the first): `{"step": step, **fields}`. Values are host numbers.

        A value that is not finite becomes null, as JSON has no NaN, and its name goes to `nonfinite`.
        """
        if not self._write:
            return
        record = _record(step, fields)
        self._append(record)
        if self._tensorboard:
            self._tensorboard.add(record)
        if self._wandb:
            self._wandb.log(numbers(record), step=step)
        self._display.show(record)

    def advance(self, step: int, progress: float) -> None:
        """Move the live line after each step; `progress` is the run's 0..1. Reads nothing from a device."""
        if self._write:
            self._display.advance(step, progress)

    def close(self) -> None:
        """Flush and close everything; closing twice is fine."""
        if not self._write:
            return
        self._write = False
        self._display.close()
        os.close(self._file)
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with writing(self._path):
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, "no space left on the device")


def truncate(path: Path, step: int) -> None:
    """Keep the whole records of a metrics file up to `step`, by an atomic rewrite; no file, nothing to do."""
    if not path.exists():
        return
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) == len(lines):
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run folder in their order; a line torn by a kill, or without a step, is left out."""
    return [record for record in _read_lines(folder / METRICS) if isinstance(record.get("step"), int)]


def record_start(folder: Path, step: int, **facts: Any) -> None:
    """Add one line about this start of the run to starts.jsonl: parameters, device, versions, MFU's denominator..."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / STARTS), (folder / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "utc": now, **facts}) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What `record_start` wrote, oldest first."""
    return _read_lines(folder / STARTS)


def training_line(record: Fields, total_steps: int | None = None) -> str:
    """`step 120/1000  loss 3.2123  lr 2.9e-04  grad 0.81  1.31k tokens/s  mfu 41.0%`, of what the record has."""
    return "  ".join(training_words(record, total_steps))


def training_words(record: Fields, total_steps: int | None = None) -> list[str]:
    """The parts of `training_line`, the most wanted first."""
    words = [f"step {record['step']}" + (f"/{total_steps}" if total_steps else "")]
    words += [f"{name} not finite" for name in str(record.get("nonfinite") or "").split()]
    return words + _shaped(record, TRAINING_WORDS)


def fitting(words: Sequence[str], width: int) -> str:
    """As many of the words as go into a line of `width` characters, the first one always."""
    line = words[0]
    for word in words[1:]:
        if len(line) + 2 + len(word) > width:
            break
        line += f"  {word}"
    return line


def validation_line(record: Fields) -> str:
    """`step 120  validation loss 3.1021  perplexity 22.2  2.0513 bits per byte`."""
    return "  ".join([f"step {record['step']}", *_shaped(record, VALIDATION_WORDS)])


def _shaped(record: Fields, words: Mapping[str, Callable[[Any], str]]) -> list[str]:
    return [shape(record[name]) for name, shape in words.items() if record.get(name) is not None]


class _Display:
    """Shows nothing; knows the pace, from which the time left follows."""

    def __init__(self, step: int, total_steps: int | None) -> None:
        self.step, self.total_steps, self.progress = step, total_steps, 0.0
        self._pace: deque[tuple[float, float]] = deque(maxlen=64)

    def advance(self, step: int, progress: float) -> None:
        self.step, self.progress = step, progress
        self._pace.append((time.monotonic(), progress))

    def show(self, record: Fields) -> None:
        pass

    def close(self) -> None:
        pass

    def left(self) -> str:
        """Percent done and time left at the pace of the last steps."""
        done = f"{100 * self.progress:.0f} %"
        if len(self._pace) < 2 or self._pace[-1][1] <= self._pace[0][1]:
            return done
        (t0, p0), (t1, p1) = self._pace[0], self._pace[-1]
        return f"{done}  {duration((1 - p1) * (t1 - t0) / (p1 - p0))} left"


class _PlainDisplay(_Display):
    """A line a record."""

    def show(self, record: Fields) -> None:
        if "loss" in record:
            ending = f"  {self.left()}" if self._pace else ""
            get_logger().info(training_line(record, self.total_steps) + ending)
        if "val_loss" in record:
            get_logger().info(validation_line(record))


class _LiveDisplay(_Display):
    """One line that moves; evaluations stay on the screen above it."""

    def __init__(self, step: int, total_steps: int | None) -> None:
        super().__init__(step, total_steps)
        self._record: Fields = {}
        self._gauge = BarColumn(bar_width=_BAR[1])
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)), self._gauge,
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console(), refresh_per_second=4,
        )  # fmt: skip
        self._task: TaskID = self._bar.add_task("start", total=1.0, left="")
        self._bar.start()

    def advance(self, step: int, progress: float) -> None:
        super().advance(step, progress)
        left = self.left()
        room = console().width - len(left) - 2  # a space on either side of the bar
        words = fitting(training_words({**self._record, "step": step}, self.total_steps), room - _BAR[0])
        self._gauge.bar_width = min(max(room - len(words), 1), _BAR[1])
        self._bar.update(self._task, completed=progress, description=words, left=left)

    def show(self, record: Fields) -> None:
        if "loss" in record:
            self._record = record
        if "val_loss" in record:
            get_logger().info(validation_line(record))

    def close(self) -> None:
        self._bar.stop()


def _display(step: int, total_steps: int | None) -> _Display:
    kind = _Display if is_quiet() else _LiveDisplay if console().is_terminal else _PlainDisplay
    return kind(step, total_steps)


def _record(step: int, fields: Fields) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step}
    lost = [k for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)]
    record.update({k: None if k in lost else v for k, v in fields.items()})
    return record | ({"nonfinite": " ".join(lost)} if lost else {})


def _step_of(line: bytes) -> float:
    """Step of a record; infinity for what is no record, so that it is dropped."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return math.inf


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def _open_wandb(project: str, folder: Path, config: Mapping[str, Any]) -> Any | None:
    """A Weights & Biases run, the same one after a resume. It never stops training: no account, no network -> offline.

    Steps that a resume takes again are dropped by wandb, which keeps the first value of a step.
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"log.wandb={project}: the wandb package is missing; pip install 'shardwright[wandb]', or log.wandb=null"
        ) from None
    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    for mode in dict.fromkeys((_wandb_mode(wandb), "offline")):
        try:
            return wandb.init(
                project=project, name=folder.name, id=identity.read_text().strip(), dir=str(folder), resume="allow",
                config=dict(config), mode=mode, settings=wandb.Settings(init_timeout=30),
            )  # fmt: skip
        except Exception as error:  # its own errors, of the network and of the file system
            get_logger().warning(f"wandb ({mode}) does not start: {' '.join(str(error).split())}")
    return None


def _wandb_mode(wandb: Any) -> str:
    """What WANDB_MODE says; else online where an account is known and can be reached."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    with suppress(Exception):
        return "online" if wandb.login(prompt=False) else "offline"
    return "offline"
