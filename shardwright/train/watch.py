"""Heartbeats of a run, and what happens when it stands still: every rank leaves, and one page says who held it up.

Beside run.py, above stall.py. The training thread sets the name of its phase and nothing else; a thread of each rank
looks at where the run is, writes that to a small file of the rank's own, and finds out by itself that nothing moves. No
rank asks another one anything, in the step or outside of it: all goes through <run>/watch. A rank that stands
still for `watch.timeout` claims the stall there; every rank that finds the claim adds its stacks, the claiming one
reads what all have written, says who holds the others up, and then all of them leave with exit code 1.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from shardwright.checkpoint.ranks import Ranks
from shardwright.config import Config, parse_duration
from shardwright.log import get_logger
from shardwright.parallel.mesh import World
from shardwright.train.stall import Stall, Word, as_text, read_stacks

WATCH = "watch"
RANKS_PER_FOLDER = 240  # up to four files a rank
LOOK_S = 1.0  # between looks at where the run is
BEFORE_FIRST = 3.0  # times the timeout until a step was done: it may compile
SHARE = 0.8  # of parallel.timeout, after which collectives fail and nobody is left to ask
PYSPY_S = 20.0
PATIENCE_S = 60.0  # for the page of another rank
SETTLE_S = 1.0  # for claims that are made at the same time

#: Writes the page of a stall into a folder, under a name without suffix; gives the file to name to the user.
Tell = Callable[[Stall, Path, str], Path]
#: Where a run is: (step, forward passes begun in it, first and last sequence or None).
Where = Callable[[], tuple[int, int, tuple[int, int] | None]]


class Phase:
    """What the training thread says of itself."""

    def __init__(self) -> None:
        self.phase, self.since = "start", time.time()
        self.steps = 0  # done since the start

    def enter(self, phase: str) -> None:
        """Now comes `phase`, one of `stall.PHASES`."""
        self.phase, self.since = phase, time.time()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` within, then what was before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


class Watch(Phase):
    """The heart of one rank; a context around the run. Without `watch.timeout` it is a `Phase` and nothing more."""

    def __init__(self, config: Config, world: World, ranks: Ranks, tell: Tell | None = None) -> None:
        super().__init__()
        self.folder = Path(config.run or "") / WATCH
        self.world, self.tell = world, tell or write_text
        self.where: Where = lambda: (0, 0, None)
        self.every = parse_duration(config.watch.every)
        self.timeout = stall_timeout(config, world.size)
        self._start = ranks.share(str(time.time_ns()))
        self._beat, self._stop, self._stalled = 0, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardwright-watch", daemon=True)
        self._dump: IO[str] | None = None

    def __enter__(self) -> Watch:
        if self.timeout is not None:
            with suppress(OSError):
                self._file(".json").parent.mkdir(parents=True, exist_ok=True)
                self._file(".late").unlink(missing_ok=True)
                self._dump = self._file(".late").open("w")
            if self.world.leads:
                self._tidy()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._thread.is_alive():
            return
        if self._stalled.is_set():  # the others leave: what this rank makes of that is no news
            self._thread.join()
        if kind is not None and self._claim.exists():  # they have left, and this rank was only just woken
            self._await_page()
            end_process()
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._dump is not None:
            self._dump.close()
        with suppress(OSError):
            self._file(".late").unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        clock = Standstill()
        last_word = -self.every
        self._arm()
        while not self._stop.wait(min(LOOK_S, self.every / 2)):
            still = clock.look(self)
            if time.monotonic() - last_word >= self.every:
                last_word = time.monotonic()
                self._arm()
                self._write(clock)
                if self._claim.exists():
                    return self._leave(clock)
            if self._is_over(still):
                return self._leave(clock)
        clock.look(self)
        self._write(clock, left=True)

    def _is_over(self, still: float) -> bool:
        """Whether nothing has moved for too long. The end of a run is rank 0's own work, of any length."""
        assert self.timeout is not None
        return still > self.timeout * (1.0 if self.steps else BEFORE_FIRST) and self.phase != "end"

    def _word(self, clock: Standstill, **more: Any) -> Word:
        self._beat += 1
        step, passes, sequences = clock.where
        return Word(
            rank=self.world.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            beat=self._beat,
            phase=self.phase,
            since=clock.since,
            written=time.time(),
            step=step,
            passes=passes,
            sequences=sequences,
            **more,
        )

    def _write(self, clock: Standstill, **more: Any) -> None:
        """The rank's word, whole or not at all; a disk that refuses is the run's own business."""
        word = {"start": self._start, **asdict(self._word(clock, **more))}
        path = self._file(".json")
        with suppress(OSError):
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(word), encoding="utf-8")
            fresh.replace(path)

    def _arm(self) -> None:
        """Should this thread itself not run any more (the interpreter's lock is held), C writes the stacks down."""
        if self._dump is not None and self.timeout is not None:
            faulthandler.dump_traceback_later(max(self.timeout, 3 * self.every), file=self._dump)

    # ------------------------------------------------------------------------------------------ a stall

    def _leave(self, clock: Standstill) -> None:
        """Add this rank's stacks; write the page or wait for it; end the process."""
        self._stalled.set()
        seen = read_stacks(without=threading.get_ident())
        self._write(clock, stalled=True, **seen._asdict())
        with suppress(Exception):
            dump_flight_recorder(self._file(".nccl.json"))
        try:
            if self._claims():
                self._compose()
            else:
                self._await_page()
        except Exception as error:
            get_logger().error("the page of the stall could not be written: %s", error)
        end_process()

    @property
    def _claim(self) -> Path:
        return self.folder / f"{self._start}.claim"

    @property
    def _told(self) -> Path:
        return self.folder / f"{self._start}.told"

    def _claims(self) -> bool:
        """Whether this rank is the one that tells. So it is where the folder cannot be written to.

        No lock of a shared file system is asked for: of several that claim at once the last one's name stays in the
        file, and each looks which that is once all have written.
        """
        if self._claim.exists():
            return False
        try:
            fresh = self._claim.with_name(f"{self._claim.name}.{self.world.rank}")
            fresh.write_text(str(self.world.rank), encoding="utf-8")
            fresh.replace(self._claim)
            time.sleep(SETTLE_S)
            return self._claim.read_text(encoding="utf-8") == str(self.world.rank)
        except OSError:
            return True

    def _compose(self) -> None:
        """Hear all ranks out, write the page, and say the verdict."""
        stall = self._gather()
        text = f"stalled: {stall.verdict}"
        try:
            path = self.tell(stall, self.folder, time.strftime("stall_%Y%m%d-%H%M%S"))
            text += f"; all stacks in {path}"
        except Exception as error:
            text += f"; no page, since {error}"
        print(f"shardwright: {' '.join(text.split())}", file=sys.stderr, flush=True)
        with suppress(OSError):
            self._told.write_text(stall.verdict, encoding="utf-8")
        time.sleep(2 * LOOK_S)  # the others leave first: none of them finds a peer gone

    def _await_page(self) -> None:
        deadline = time.monotonic() + self._hearing() + PATIENCE_S + PYSPY_S
        while not self._told.exists() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _hearing(self) -> float:
        """Seconds in which a rank that lives writes a word, finds the claim and adds its stacks."""
        return 3 * self.every + 2

    def _gather(self) -> Stall:
        """Everybody's word, once all have added their stacks or had time to."""
        words: dict[int, Word] = {}
        before: dict[int, int] = {}
        deadline = time.monotonic() + self._hearing()
        while True:
            for rank in range(self.world.size):
                if rank not in words or not (words[rank].stalled or words[rank].left):
                    word = self._read(rank)
                    if word is not None:
                        words[rank] = word
                        before.setdefault(rank, word.beat)
            open_ = [r for r in range(self.world.size) if r not in words or not (words[r].stalled or words[r].left)]
            if not open_ or time.monotonic() > deadline:
                break
            time.sleep(min(1.0, self.every / 4))
        silent = [rank for rank in open_ if rank not in words or words[rank].beat == before[rank]]
        for rank in silent:
            if rank in words:
                words[rank] = replace(words[rank], extra=self._other_hand(words[rank]))
        return Stall(str(self.folder.parent), self.world.size, words, frozenset(silent))

    def _read(self, rank: int) -> Word | None:
        try:
            raw = json.loads(self._file(".json", rank).read_text(encoding="utf-8"))
            return Word.of(raw) if raw.get("start") == self._start else None
        except (OSError, ValueError):
            return None

    def _other_hand(self, word: Word) -> str:
        """Stacks of a rank that cannot write them: what faulthandler left, or py-spy sees."""
        with suppress(OSError):
            late = self._file(".late", word.rank).read_text(encoding="utf-8", errors="replace").strip()
            if late:
                return f"written by faulthandler, since no Python thread could run:\n{late}"
        if word.host != socket.gethostname():
            return f"no stacks: run `py-spy dump --pid {word.pid}` on {word.host}"
        return spy(word.pid)

    def _file(self, suffix: str, rank: int | None = None) -> Path:
        return heartbeat_path(self.folder, self.world.rank if rank is None else rank, suffix)

    def _tidy(self) -> None:
        """Remove the claims of earlier starts; their pages stay."""
        for path in [*self.folder.glob("*.claim*"), *self.folder.glob("*.told")]:
            with suppress(OSError):
                path.unlink()


class Standstill:
    """For how long the run has been where it is, counted in looks: a process that was suspended itself lost no time."""

    def __init__(self) -> None:
        self.since, self.where = time.time(), (0, 0, None)  # type: tuple[float, Any]
        self._key: Any = None
        self._still, self._looked = 0.0, time.monotonic()

    def look(self, watch: Watch) -> float:
        """Seconds without a change of phase, step or micro-batch."""
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        phase, entered = watch.phase, watch.since
        with suppress(Exception):  # read while the training thread changes it
            self.where = watch.where()
        key = (phase, entered, self.where)
        if key != self._key:
            self._key, self._still = key, 0.0
            self.since = max(entered, time.time() - gap)
        else:
            self._still += min(gap, 10 * LOOK_S)
        return self._still


def heartbeat_path(folder: Path, rank: int, suffix: str) -> Path:
    """File of a rank below <run>/watch."""
    return folder / f"{rank // RANKS_PER_FOLDER:03}" / f"rank_{rank:05}{suffix}"


def end_process() -> None:
    """Leave with exit code 1, whatever the other threads are stuck in."""
    for child in multiprocessing.active_children():  # a stopped one would not see that its parent is gone
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def stall_timeout(config: Config, size: int) -> float | None:
    """Seconds after which a run counts as stalled; None where it never does."""
    if config.watch.timeout is None:
        return None
    asked = parse_duration(config.watch.timeout)
    return asked if size == 1 else min(asked, SHARE * parse_duration(config.parallel.timeout))


def write_text(stall: Stall, folder: Path, name: str) -> Path:
    """The page of a stall without HTML, for runs that were not started by the command line."""
    path = folder / f"{name}.txt"
    path.write_text(as_text(stall), encoding="utf-8")
    return path


def spy(pid: int) -> str:
    """What py-spy sees of a process of this host, or why it sees nothing."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return "no stacks: py-spy is not installed (pip install py-spy)"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PYSPY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: py-spy: {error}"
    if done.returncode == 0 and done.stdout.strip():
        return f"seen by py-spy:\n{done.stdout.strip()}"
    why = " ".join(done.stderr.partition("Stack backtrace")[0].split())
    return f"no stacks: py-spy: {why or 'nothing seen'} (it needs the right to ptrace)"


def dump_flight_recorder(path: Path) -> None:
    """NCCL's flight recorder as JSON, where torch has it and a buffer was asked for by TORCH_FR_BUFFER_SIZE."""
    asked = os.environ.get("TORCH_FR_BUFFER_SIZE") or os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE") or "0"
    if not torch.cuda.is_available() or not asked.isdecimal() or int(asked) == 0:
        return
    module = torch._C._distributed_c10d
    dump = getattr(module, "_dump_nccl_trace_json", None) or getattr(module, "_dump_fr_trace_json", None)
    if dump is not None:
        found = dump()
        path.write_bytes(found if isinstance(found, bytes) else str(found).encode())
