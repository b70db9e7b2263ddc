"""TensorBoard's event file: the numbers of metrics.jsonl once more, for TensorBoard's readers.

Beside metrics.py, which owns it. Every start of a run writes one file anew from the records that stand, and the older
ones go: TensorBoard's data server knows no purge, and would show what a resume dropped. One event a record, written at
once and without a thread, so that after a kill TensorBoard knows what metrics.jsonl knows.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardwright.log import get_logger

Record = Mapping[str, Any]

EVENTS = "events.out.tfevents."
_FRESH = ".fresh"  # a file that is not yet whole; no reader takes the name
_READ_BY = 3600.0  # seconds in which a TensorBoard that watches has looked again


def tag(name: str) -> str:
    """TensorBoard's tag of a field: `val_loss` -> `validation/loss`, `mfu` -> `speed/mfu`, else `train/...`."""
    if name.startswith("val_"):
        return f"validation/{name.removeprefix('val_')}"
    speed = name.endswith(("_s", "_gib", "_kwh")) or name == "mfu"
    return f"{'speed' if speed else 'train'}/{name}"


def numbers(record: Record) -> dict[str, float]:
    """What of a record can be drawn over its step."""
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}


class EventFile:
    """The event file of this start; where it cannot be written, it says so once and is no more."""

    def __init__(self, folder: Path, records: Iterable[Record]) -> None:
        self.folder = folder
        self._writer: Any = None
        self._trying(lambda: self._open(records))

    def add(self, record: Record) -> None:
        """Write the numbers of a record."""
        self._trying(lambda: self._write(record, time.time()))

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None

    def _trying(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            what = error.strerror or error
            get_logger().warning("%s: cannot be written: %s; going on without TensorBoard", self.folder, what)
            self.close()
            with suppress(OSError):
                (self.folder / _FRESH).unlink()

    def _open(self, records: Iterable[Record]) -> None:
        """The new file gets its name once it is whole; then the older ones are emptied, and later removed.

        A TensorBoard that watches the run goes on from an empty file to the next, but not from one that has vanished.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        older = sorted(self.folder.glob(f"{EVENTS}*"))
        times = {step: when for path in older for step, when in _wall_times(path)}
        fresh = self.folder / _FRESH
        self._writer = RecordWriter(fresh.open("wb"))
        now = time.time()
        self._put(Event(wall_time=now, file_version="brain.Event:2"))
        # A TensorBoard that watches the run drops what it has read so far.
        self._put(Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)))
        for record in records:
            self._write(record, times.get(record["step"], now), flush=False)
        self._writer.flush()
        fresh.rename(self.folder / _next_name(older))
        for path in older:
            if path.stat().st_size:
                path.write_bytes(b"")
            elif now - path.stat().st_mtime > _READ_BY:
                path.unlink()

    def _write(self, record: Record, when: float, *, flush: bool = True) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            return
        values = [Summary.Value(tag=tag(name), simple_value=value) for name, value in numbers(record).items()]
        self._put(Event(wall_time=when, step=record["step"], summary=Summary(value=values)))
        if flush:
            self._writer.flush()

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def _next_name(older: list[Path]) -> str:
    """A name that sorts behind the older ones: readers go on to what comes later, and names hold only the second."""
    seconds = [path.name.removeprefix(EVENTS).split(".")[0] for path in older]
    later = [int(second) + 1 for second in seconds if second.isdecimal()]
    return f"{EVENTS}{max([int(time.time()), *later]):010d}.{socket.gethostname()}.0"


def _wall_times(path: Path) -> Iterable[tuple[int, float]]:
    """(step, time of writing) of the events of a file, as far as it can be read."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return ((event.step, event.wall_time) for event in LegacyEventFileLoader(str(path)).Load() if event.step)
