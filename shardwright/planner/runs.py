"""A finished or running run as its folder tells it: records, starts, config, and the figures drawn from them.

Reads metrics.jsonl, starts.jsonl and config.yaml and nothing else; `report` shows what is here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.config import ConfigError, read_yaml
from shardwright.log import duration, quantity
from shardwright.train.metrics import METRICS, read_metrics, read_starts

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    name: str
    records: list[dict[str, Any]]
    starts: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> list[tuple[Record, float]]:
        """(record, value) of the records that have this field."""
        return [(r, r[name]) for r in self.records if isinstance(r.get(name), (int, float))]

    def last(self, name: str) -> float | None:
        """The newest value of a field."""
        found = self.column(name)
        return found[-1][1] if found else None

    def median(self, name: str) -> float | None:
        """Median of a field over the run without its first tenth, which warms up."""
        values = [value for _, value in self.column(name)]
        return statistics.median(values[len(values) // 10 :]) if values else None

    def setting(self, key: str) -> Any:
        """A value of the config by its dotted key; None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def fact(self, name: str) -> Any:
        """A fact of the latest start that states it."""
        return next((s[name] for s in reversed(self.starts) if s.get(name) is not None), None)

    @property
    def steps(self) -> int:
        """The newest step that was recorded."""
        return self.records[-1]["step"] if self.records else 0

    def seconds(self) -> float | None:
        """Time spent in steps: a record's `step_s` stands for all steps since the record before it."""
        total, last = 0.0, 0
        for record, step_s in self.column("step_s"):
            total, last = total + step_s * (record["step"] - last), record["step"]
        return total or None

    def best_validation(self) -> tuple[str, float, Record] | None:
        """(field, value, record) of the best evaluation, in bits per byte where they were measured."""
        for name in ("val_bits_per_byte", "val_loss"):
            if found := self.column(name):
                record, value = min(found, key=lambda pair: pair[1])
                return name, value, record
        return None


def load_run(folder: Path) -> Run:
    """Read a run folder; records of one step become one. ConfigError where it is none."""
    if not (folder / METRICS).is_file():
        missing = f"holds no {METRICS}" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {missing}; expected the folder of a run, as `shardwright train` makes it")
    merged: dict[int, dict[str, Any]] = {}
    for record in read_metrics(folder):
        merged[record["step"]] = merged.get(record["step"], {}) | record
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    return Run(folder.resolve().name, [merged[step] for step in sorted(merged)], read_starts(folder), config)


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers a reader wants first: (label, value, remark)."""
    found: list[tuple[str, str, str]] = []
    if best := run.best_validation():
        label = "Bits per byte" if best[0] == "val_bits_per_byte" else "Validation loss"
        found.append((label, f"{best[1]:.4f}", f"best validation, step {best[2]['step']:,}"))
    if losses := [value for _, value in run.column("loss")]:
        tail = losses[-max(len(losses) // 20, 1) :]
        found.append(("Training loss", f"{statistics.fmean(tail):.4f}", "mean of the last records"))
    if (tokens := run.last("tokens")) is not None:
        found.append(("Tokens", quantity(tokens), f"in {run.steps:,} steps"))
    if (rate := run.median("tokens_per_s")) is not None:
        found.append(("Tokens a second", quantity(rate), "median"))
    if (mfu := run.median("mfu")) is not None:
        peak = str(run.fact("mfu_basis") or "").partition(" over ")[2]
        found.append(("MFU", f"{mfu:.1%}", f"of {peak}" if peak else "median"))
    if (seconds := run.seconds()) is not None:
        energy = run.last("energy_kwh")
        remark = "without evaluations and saves" if energy is None else f"{quantity(energy)} kWh"
        found.append(("Time in steps", duration(seconds), remark))
    return found


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the summary table: a label, then a cell a run; rows that no run fills are left out."""
    rows = [[label, *(str(cell(run) or "") for run in runs)] for label, cell in SUMMARY]
    return [[row[0], *(text or "–" for text in row[1:])] for row in rows if any(row[1:])]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of the settings on which the runs disagree: a key, then a value a run."""
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key != "run")
    rows = [[key, *(str(settings.get(key, "–")) for settings in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _joined(*words: str | None) -> str:
    return ", ".join(word for word in words if word)


def _said(run: Run, key: str, words: str) -> str:
    """A setting in words, `{}` standing for it; nothing where it is not set."""
    value = run.setting(key)
    return "" if value is None else words.format(f"{value:,}" if isinstance(value, int) else value)


def _shape(run: Run) -> str:
    return _joined(
        run.setting("model.family"),
        _said(run, "model.layers", "{} layers"),
        _said(run, "model.width", "width {}"),
        _said(run, "model.heads", "{} heads"),
        _said(run, "model.vocab_size", "vocabulary {}"),
    )


def _data(run: Run) -> str:
    sources = [s.get("path") for s in run.setting("data.sources") or [] if isinstance(s, dict)]
    return _joined(run.setting("data.path"), *sources, _said(run, "data.sequence_length", "sequences of {} tokens"))


def _batch(run: Run) -> str:
    return _joined(
        _said(run, "batch.sequences", "{} sequences"),
        _said(run, "batch.tokens", "{} tokens"),
        _said(run, "batch.micro", "micro-batch {}"),
    )


def _length(run: Run) -> str:
    wanted = _said(run, "train.steps", "{} steps") or _said(run, "train.tokens", "{} tokens")
    wanted = wanted or _said(run, "train.budget", "a budget of {}")
    done = _joined(f"{run.steps:,} steps", f"{quantity(run.last('tokens') or 0)} tokens")
    return f"{done}, of {wanted}" if wanted else done


def _best(run: Run) -> str:
    best = run.best_validation()
    if best is None:
        return ""
    name, value, record = best
    unit = "bits per byte" if name == "val_bits_per_byte" else "nats a token"
    perplexity = f"perplexity {record['val_perplexity']:.4g}" if record.get("val_perplexity") else ""
    return _joined(f"{value:.4f} {unit} at step {record['step']:,}", perplexity)


def _speed(run: Run) -> str:
    rate, mfu = run.median("tokens_per_s"), run.median("mfu")
    return _joined(f"{quantity(rate)} tokens/s" if rate else "", "" if mfu is None else f"MFU {mfu:.1%}")


def _spent(run: Run) -> str:
    seconds, energy, memory = run.seconds(), run.last("energy_kwh"), run.column("mem_gib")
    return _joined(
        f"{duration(seconds)} in steps" if seconds else "",
        "" if energy is None else f"{quantity(energy)} kWh",
        f"{max(value for _, value in memory):.2f} GiB at most" if memory else "",
    )


def _device(run: Run) -> str:
    count, name = run.fact("num_devices") or 1, run.fact("device")
    return f"{count} x {name}" if name and count > 1 else str(name or "")


def _starts(run: Run) -> str:
    if not run.starts:
        return ""
    resumed = ", ".join(f"{start['step']:,}" for start in run.starts[1:])
    first = run.starts[0]["utc"].replace("T", " ").replace("+00:00", " UTC")
    return _joined(first, f"then from step {resumed}" if resumed else "")


SUMMARY: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("Model", _shape),
    ("Parameters", lambda run: f"{run.fact('parameters'):,}" if run.fact("parameters") else ""),
    ("Data", _data),
    ("Global batch", _batch),
    ("Length", _length),
    ("Optimizer", lambda run: _joined(run.setting("optimizer.name"), _said(run, "optimizer.lr", "peak rate {}"))),
    ("Schedule", lambda run: run.setting("schedule.name")),
    ("Precision", lambda run: run.setting("precision.compute")),
    ("Seed", lambda run: _said(run, "train.seed", "{}")),
    ("Best validation", _best),
    ("Speed", _speed),
    ("MFU", lambda run: str(run.fact("mfu_basis") or "").removeprefix("MFU: ")),
    ("Spent", _spent),
    ("Not finite", lambda run: _joined(*(f"step {r['step']:,}" for r in run.records if r.get("nonfinite")))),
    ("Device", _device),
    ("Versions", lambda run: _joined(*(f"{k} {v}" for k, v in (run.fact("versions") or {}).items()))),
    ("Started", _starts),
)
