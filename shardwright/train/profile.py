"""A profiler trace of chosen steps, written into the run folder (`log.profile: [first, last]`).

Room train; used by the loop around each step. `profile/steps_00010-00012.rank0.json.gz` opens in ui.perfetto.dev or
chrome://tracing, the `.txt` beside it lists the operators by the time they take themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwright.config import ConfigError
from shardwright.log import get_logger, rank

ROWS = 40  # operators in the table


class StepProfiler:
    """Profiles the steps `first` to `last`, both included; `steps=None` does nothing at no cost.

    ```
    profiler = StepProfiler(folder, config.log.profile)
    with profiler.step(number): ...
    profiler.close()
    ```
    """

    def __init__(self, folder: Path, steps: Sequence[int] | None) -> None:
        self._folder = folder / "profile"
        self._first, self._last = steps or (0, -1)
        if steps and not 1 <= self._first <= self._last:
            raise ConfigError(f"log.profile={list(steps)}: expected the first and the last step, at least 1, in order")
        self._profile: Any | None = None
        self._steps: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number` (1 is the first)."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._profile is None:
            self._profile = _started_profile()
        self._steps.append(number)
        from torch.profiler import record_function

        with record_function(f"step {number}"):
            yield
        if number == self._last:
            self.close()

    def close(self) -> Path | None:
        """Write what was traced so far: a run may end before `last`. Returns the trace; None where there is none."""
        if self._profile is None:
            return None
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"steps_{self._steps[0]:05}-{self._steps[-1]:05}.rank{rank()}"
        trace = stem.with_name(stem.name + ".json.gz")
        profile.export_chrome_trace(str(trace))
        averages = profile.key_averages()
        by = "self_cuda_time_total" if any(e.self_device_time_total > 0 for e in averages) else "self_cpu_time_total"
        stem.with_name(stem.name + ".txt").write_text(averages.table(sort_by=by, row_limit=ROWS), encoding="utf-8")
        get_logger().info(f"profiler trace of steps {self._steps[0]}-{self._steps[-1]}: {trace}")
        return trace


def _started_profile() -> Any:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    running = profile(activities=activities, record_shapes=True, profile_memory=True)
    running.start()
    return running
