"""A stalled run as every rank left word of it: who holds the others up, in one line, and all there is to see in a text.

Below watch.py, which writes these files and reads them here; the planner makes a page of a `Stall`. Pure but for
`read_stacks`, which looks at this process.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

#: What a rank does, in the order in which one comes by it, and how it is said of one.
PHASES = {
    "start": "starting",
    "between": "between steps",
    "evaluate": "in the evaluation",
    "save": "saving a checkpoint",
    "data": "in data loading",
    "step": "in the step",
    "end": "ending the run",
}
#: Functions that a rank waits for others in, and what to call them where their names do not say.
COLLECTIVES = {
    "_wait_batch_p2p": "send and receive",
    "wait_for_unshard": "all_gather",
    "wait_tensor": "a collective",
    "wait": "a collective",  # of DeepSpeed's handles
    "monitored_barrier": "barrier",
    "batch_isend_irecv": "send and receive",
}
_PLAIN = ("all_reduce", "all_gather", "all_to_all", "reduce", "broadcast", "barrier", "gather", "scatter", "send",
          "recv", "isend", "irecv", "init_process_group", "new_group", "destroy_process_group")  # fmt: skip
_THROUGH = (
    "torch/_ops.py",
    "torch/utils/",
    "torch/_tensor.py",
    "torch/autograd/",
    "contextlib.py",
    "typing_extensions",
    "deepspeed/utils/nvtx.py",
)
_BACKWARD = "_engine_run_backward"  # torch's own, around every backward pass
_NEVER_STUCK = ("signals", "shardwright-watch")  # threads that only wait for something to do
SHOWN = 4  # ranks that a verdict names one by one


@dataclass(frozen=True)
class Stack:
    """One thread: its name and its frames, innermost first."""

    thread: str
    frames: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.thread}:", *(f"  {frame}" for frame in self.frames)])


@dataclass(frozen=True)
class Word:
    """What one rank wrote last. Times are seconds since 1970 by its own clock."""

    rank: int
    host: str
    pid: int
    beat: int  # counts its words
    phase: str
    since: float  # when it last got on
    written: float
    step: int = 0  # 1 is the first
    passes: int = 0  # forward passes begun in this step or evaluation: the number of its micro-batch
    sequences: tuple[int, int] | None = None  # first and last of the step, over all ranks
    stalled: bool = False
    left: bool = False
    collective: str | None = None  # that it waits in
    backward: bool = False  # in the backward pass, whose collectives may be C++'s own, as those of DDP are
    stacks: tuple[Stack, ...] = ()
    extra: str = ""  # stacks by another hand: py-spy's, or those of faulthandler

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Word:
        """From its JSON; ValueError where that is not one."""
        try:
            stacks = tuple(Stack(s["thread"], tuple(s["frames"])) for s in raw.get("stacks", ()))
            sequences = raw.get("sequences")
            known = {key: raw[key] for key in cls.__dataclass_fields__ if key in raw}
            return cls(**{**known, "stacks": stacks, "sequences": tuple(sequences) if sequences else None})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a heartbeat: {error}") from None

    @property
    def name(self) -> str:
        """The rank and where it runs."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def place(self) -> tuple[int, int, int]:
        """How far it has come."""
        return self.step, list(PHASES).index(self.phase) if self.phase in PHASES else 0, self.passes

    @property
    def doing(self) -> str:
        """Its phase, and where in the data."""
        words = ["in the backward pass" if self.backward else PHASES.get(self.phase, self.phase)]
        if self.step and self.phase in ("data", "step"):
            words.append(f"of step {self.step}")
        elif self.step and self.phase != "start":
            words.append(f"after step {self.step - 1}")
        if self.passes and self.phase in ("step", "evaluate"):
            words.append(f"at micro-batch {self.passes}" if self.phase == "step" else f"at batch {self.passes}")
        return " ".join(words).replace("in the step of step", "in step")

    @property
    def where(self) -> str:
        """Which sequences its step takes."""
        known = self.sequences and self.phase in ("data", "step")
        return f", at sequences {self.sequences[0]} to {self.sequences[1]}" if known and self.sequences else ""


@dataclass(frozen=True)
class Stall:
    """A run that does not get on. `words` by rank; a rank that never wrote has none."""

    run: str
    size: int
    words: Mapping[int, Word]
    silent: frozenset[int] = frozenset()  # ranks that wrote nothing while the others were asked
    now: float = field(default_factory=time.time)

    @property
    def verdict(self) -> str:
        """Who holds the others up, in one line."""
        silent = sorted(self.silent)
        if silent:
            return self._about(silent, self._silence) + self._others(silent)
        words = [word for word in self.words.values() if not word.left]
        free = [word for word in words if word.collective is None]
        gone = [word for word in self.words.values() if word.left]
        if free and (len(free) < len(words) or len(words) == 1):
            held = _furthest_back(free)
        elif gone and not free:
            return self._about([w.rank for w in gone], lambda word: "has left") + self._others([w.rank for w in gone])
        else:
            held = _furthest_back(words)
        if len(held) == len(words) and len(words) > 1:
            return f"all {len(words)} ranks stand still since {min(map(self.seconds, words)):.0f} s, {_alike(words)}"
        ranks = [word.rank for word in held]
        return self._about(ranks, self._standing) + self._others(ranks)

    def seconds(self, word: Word) -> float:
        """How long a rank has stood still, by its own clock where it still writes."""
        end = self.now if word.rank in self.silent else word.written
        return max(end - (word.written if word.rank in self.silent else word.since), 0.0)

    def state(self, rank: int) -> str:
        """How a rank is, in a word or two."""
        word = self.words.get(rank)
        if rank in self.silent or word is None:
            return "silent"
        if word.left:
            return "has left"
        if word.collective:
            return f"waits in {word.collective}"
        return "in the backward pass" if word.backward else "stands still"

    def groups(self) -> list[tuple[str, str]]:
        """(ranks, their stacks), those with equal stacks together; the ranks that the verdict is about come first."""
        found: dict[str, list[int]] = {}
        for rank, word in sorted(self.words.items()):
            text = "\n\n".join([*map(str, word.stacks), *([word.extra] if word.extra else [])])
            if text:
                found.setdefault(text, []).append(rank)
        first = self.verdict
        order = sorted(found.items(), key=lambda item: (f"rank {item[1][0]} " not in first, len(item[1]), item[1]))
        return [(f"{'rank' if len(ranks) == 1 else 'ranks'} {join(ranks)}", text) for text, ranks in order]

    def _about(self, ranks: Sequence[int], doing: Callable[[Word], str]) -> str:
        texts = [self._one(rank, doing) for rank in ranks[:SHOWN]]
        if len(ranks) > SHOWN:
            texts.append(f"and so with {len(ranks) - SHOWN} more (ranks {join(ranks[SHOWN:])})")
        return "; ".join(texts)

    def _one(self, rank: int, doing: Callable[[Word], str]) -> str:
        word = self.words.get(rank)
        return f"rank {rank} has not written since the start" if word is None else f"{word.name} {doing(word)}"

    def _silence(self, word: Word) -> str:
        return f"is silent since {self.seconds(word):.0f} s, last seen {word.doing}{word.where}"

    def _standing(self, word: Word) -> str:
        held = f", waiting in {word.collective}" if word.collective else ""
        return f"is {word.doing} since {self.seconds(word):.0f} s{held}{word.where}"

    def _others(self, ranks: Iterable[int]) -> str:
        others = [word for rank, word in sorted(self.words.items()) if rank not in set(ranks)]
        if not others:
            return ""
        count, one = len(others), len(others) == 1
        if _all_wait(others):
            return f"; the other {count} {'waits' if one else 'wait'} in {self._waiting(others)}"
        if all(word.backward for word in others) and len({word.doing for word in others}) == 1:
            return f"; the other {count} {'is' if one else 'are'} {others[0].doing}"
        return f"; of the others {self._waiting(others)}"

    def _waiting(self, words: Sequence[Word]) -> str:
        counts = Counter(word.collective or ("(left)" if word.left else f"({word.doing})") for word in words)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} in {what}" for what, count in counts.most_common())


def _alike(words: Sequence[Word]) -> str:
    """What ranks of one place do: wait in one collective, or in several; or the same thing without one."""
    counts = Counter(word.collective for word in words)
    if set(counts) == {None}:
        return f"each {words[0].doing}{words[0].where}"
    waits = ", ".join(f"{count} in {what}" for what, count in counts.most_common()) if len(counts) > 1 else ""
    return f"waiting in {waits or words[0].collective}, {words[0].doing}: the network, or a collective gone wrong"


def _all_wait(words: Iterable[Word]) -> bool:
    return all(word.collective for word in words)


def _furthest_back(words: Sequence[Word]) -> list[Word]:
    least = min((word.place, word.backward) for word in words)
    return [word for word in words if (word.place, word.backward) == least]


def join(ranks: Iterable[int]) -> str:
    """Ranks in order, runs of three and more as a range: 0-4, 6, 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else list(map(str, run)) for run in runs]
    return ", ".join(text for part in parts for text in part)


HEADS = ("Rank", "Host", "Process", "State", "Phase", "For", "Step", "Micro-batch", "Sequences", "Last word")


def rows(stall: Stall) -> list[list[str]]:
    """One row a rank, as HEADS says."""
    lines = []
    for rank in range(stall.size):
        word = stall.words.get(rank)
        if word is None:
            lines.append([str(rank), "", "", "silent", "", "", "", "", "", "never"])
            continue
        span = f"{word.sequences[0]} to {word.sequences[1]}" if word.sequences else ""
        clock = time.strftime("%H:%M:%S", time.localtime(word.written))
        passes = word.passes if word.phase in ("step", "evaluate") else 0
        numbers = [str(word.step or ""), str(passes or ""), span]
        state = [stall.state(rank), PHASES.get(word.phase, word.phase), f"{stall.seconds(word):.0f} s"]
        lines.append([str(rank), word.host, str(word.pid), *state, *numbers, clock])
    return lines


def as_text(stall: Stall) -> str:
    """Verdict, table, stacks."""
    table = [list(HEADS), *rows(stall)]
    widths = [max(len(row[n]) for row in table) for n in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stall.now))
    stacks = [f"==== {ranks}\n{text}" for ranks, text in stall.groups()]
    return "\n\n".join([stall.verdict, f"{stall.run}, {clock}", "\n".join(lines), *stacks]) + "\n"


# ------------------------------------------------------------------------------------------ this process


class Seen(NamedTuple):
    """This process from inside; `collective` and `backward` as in a `Word`."""

    stacks: tuple[Stack, ...]
    collective: str | None
    backward: bool


def read_stacks(without: int | None = None) -> Seen:
    """Stacks of all Python threads, the main one first, but that of thread `without`; and what they wait in.

    A thread that no Python code started is one of autograd's: collectives of a backward pass wait in it.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    quiet = {ident for ident, name in names.items() if name in _NEVER_STUCK} | {without}
    main = threading.main_thread().ident
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident not in quiet}
    stacks, collective, backward = [], None, False
    for ident in sorted(frames, key=lambda ident: (ident != main, names.get(ident, "~"), ident)):
        found = _walk(frames[ident])
        stacks.append(Stack(names.get(ident, "a thread of torch"), tuple(map(_line, _below(found)))))
        if ident == main or ident not in names:
            collective = collective or collective_of([(frame.filename, frame.name) for frame in found])
        if ident == main:
            backward = any(frame.name == _BACKWARD for frame in found)
    return Seen(tuple(stacks), collective, backward)


def _walk(frame: FrameType) -> list[traceback.FrameSummary]:
    """The frames of a thread, innermost first."""
    return list(reversed(traceback.extract_stack(frame)))


def _below(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Without what started the thread, or the run: the command line, and threading's own."""
    command = [n for n, frame in enumerate(frames) if frame.filename.endswith("/launcher/cli.py")]
    if command:
        frames = frames[: command[0]]
    while len(frames) > 1 and frames[-1].filename.endswith("/threading.py"):
        frames = frames[:-1]
    return frames


def _line(frame: traceback.FrameSummary) -> str:
    """`train/run.py:241 _one_step: batch = next(self.loader)`, the path from its package on."""
    path = frame.filename.replace("\\", "/")
    for mark, kept in (("/site-packages/", ""), ("/shardwright/", "shardwright/"), ("/lib/python3.", "python3.")):
        if mark in path:
            path = f"{kept}{path.rpartition(mark)[2]}"
            break
    return f"{path}:{frame.lineno} {frame.name}" + (f": {frame.line}" if frame.line else "")


def collective_of(frames: Iterable[tuple[str, str]]) -> str | None:
    """The collective that a thread waits in, by (file, function) of its frames, innermost first; None in none.

    The innermost frame, but for those that only pass a call on, has to be torch.distributed's: a pipeline's schedule is
    part of that too, and stands below whatever its stages compute. Or DeepSpeed's own, where that is waiting.
    """
    inside = []
    for path, name in frames:
        path = path.replace("\\", "/")
        if "torch/distributed/" in path or ("deepspeed/" in path and name == "wait"):
            inside.append(name)
        elif inside or not any(part in path for part in _THROUGH):
            break
    for name in inside:
        if name in COLLECTIVES or name.lstrip("_").startswith(_PLAIN):
            return COLLECTIVES.get(name, name)
    return inside[0] if inside else None
