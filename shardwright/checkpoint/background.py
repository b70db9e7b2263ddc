"""Saving while training goes on: copy, return, write in a thread.

Top of the checkpoint room's writing side. `CheckpointWriter.save` blocks the step for one copy of this rank's share
into buffers that are kept and reused (pinned memory where tensors are on a GPU, whose copies run in stream order, so
that the host does not wait for them); everything else happens in a thread with a process group of its own. One save
is in flight at most: a second one waits for the first. What failed in the thread is logged at once and raised by the
next call, the same on every rank: all fail a save together. `check` asks without waiting, so that ranks may raise it a
step apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from shardwright.checkpoint.folder import build_folder
from shardwright.checkpoint.integrity import CheckpointError
from shardwright.checkpoint.ranks import build_ranks
from shardwright.checkpoint.save import Keep, Task, build_task, write_checkpoint
from shardwright.log import get_logger

PATIENCE_SECONDS = 1.0  # a save that waits longer than this for the one before says so


class Buffers:
    """CPU copies of named tensors, reused from save to save."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def copy(self, sources: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        """Copies of `sources` (name -> tensor of any device), and what to call before reading them."""
        self._held = {name: self._buffer(name, source) for name, source in sources.items()}
        devices = set()
        for name, source in sources.items():
            self._held[name].copy_(source, non_blocking=source.is_cuda)
            if source.is_cuda:
                devices.add(source.device)
        events = [torch.cuda.current_stream(device).record_event() for device in devices]
        return self._held, partial(_wait_for, events)

    def _buffer(self, name: str, source: torch.Tensor) -> torch.Tensor:
        held = self._held.get(name)
        if held is not None and held.shape == source.shape and held.dtype == source.dtype:
            return held
        return torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda)


class CheckpointWriter:
    """Writes the checkpoints of one run.

        with CheckpointWriter(run / "checkpoints", keep_last=2) as writer:
            writer.save(tensors, state, step=100)   # returns after one copy
            ...
        # leaving waits for the last save; `wait()` does so at any time

    Where torch.distributed runs, every rank makes one and calls the same methods in the same order (the constructor
    makes a gloo group, unless `group` gives one). `asynchronous=False` writes before `save` returns, and holds no
    copy. Failures are `SaveError`: the run may catch it and go on; the next save starts afresh.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        asynchronous: bool = True,
        group: dist.ProcessGroup | None = None,
        alone: bool = False,
    ) -> None:
        self.folder, self.keep = Path(folder), Keep(keep_last, keep_every)
        self._ranks = build_ranks(group, alone=alone)
        self._buffers = Buffers() if asynchronous else None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._path: Path | None = None
        opening = partial(build_folder, self.folder) if self._ranks.rank == 0 else None
        try:
            self._ranks.together("opening the folder of checkpoints", opening)
        except CheckpointError:
            self._ranks.close()
            raise

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, step: int) -> None:
        """Save `tensors` and `state` (see `save.save`) as they are now. Raises first what the save before left
        behind."""
        if self._closed:
            raise ValueError(f"step {step} cannot be saved: this CheckpointWriter is closed; make another")
        self._join(f"step {step}")
        self._raise()
        task = build_task(tensors, state, step, self._ranks)
        if self._buffers is None:
            self._path = write_checkpoint(self.folder, task, self._ranks, self.keep)
            return
        sources = {item.index.fqn: task.planner.resolve_data(item) for item in task.plan.items}
        task.planner.staged, ready = self._buffers.copy(sources)
        task.planner.state_dict = {}  # the live tensors are no longer this save's business
        self._thread = threading.Thread(target=self._write, args=(task, ready), name=f"checkpoint-{step}")
        self._thread.start()

    def check(self) -> None:
        """Raise what the save in flight has failed with, if it has: a look at a variable, no wait and no collective."""
        if self._error is not None:
            self.wait()

    def wait(self) -> Path | None:
        """Wait for the save in flight, raise if it failed; the newest checkpoint that this writer has written."""
        self._join()
        self._raise()
        return self._path

    def close(self) -> None:
        """`wait`, then give back the process group and the buffers."""
        try:
            self.wait()
        finally:
            self._ranks.close()
            self._buffers, self._closed = None, True

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(CheckpointError):  # it was logged when it happened; what ended the block matters more
            self.close()

    def _write(self, task: Task, ready: Callable[[], None]) -> None:
        try:
            ready()
            self._path = write_checkpoint(self.folder, task, self._ranks, self.keep)
        except Exception as error:
            get_logger().error("checkpoint: %s", error)
            self._error = error

    def _join(self, waiting: str = "") -> None:
        if self._thread is None:
            return
        begin = time.monotonic()
        self._thread.join(PATIENCE_SECONDS if waiting else None)
        if self._thread.is_alive():
            self._thread.join()
            seconds = time.monotonic() - begin
            advice = "save less often, or to a faster disk"
            get_logger().warning("checkpoint: %s waited %.1f s for the save before it; %s", waiting, seconds, advice)
        self._thread = None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _wait_for(events: list[torch.cuda.Event]) -> None:
    for event in events:
        event.synchronize()
