"""What the benchmarks share: the peers' environment, processes that take turns, statistics, pages of results.

Imports nothing but the standard library, so that a process in the peers' environment can use it too.
`python benchmarks/common.py` makes the peers' environment (.venv-peers, some 1.5 GB, about two minutes).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PEERS = ROOT / ".venv-peers"
REQUIREMENTS = HERE / "peers.txt"

_BEGIN = time.monotonic()


def say(text: str) -> None:
    """One line of progress on stderr, with the time since the start."""
    print(f"[{time.monotonic() - _BEGIN:6.1f} s] {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- environment


def peers_python() -> Path:
    """The Python of the peers' environment, made first where it is missing or `peers.txt` has changed."""
    python, stamp = PEERS / "bin" / "python", PEERS / ".installed"
    wanted = REQUIREMENTS.read_text("utf-8")
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return python
    say(f"making {PEERS.name} for the peers (once; some 1.5 GB, about two minutes)")
    venv.create(PEERS, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch], check=True)
    # The file lists everything: the peers' own ranges contradict each other, though what they use of them does not.
    subprocess.run([*pip, "--no-deps", "--requirement", str(REQUIREMENTS)], check=True)
    stamp.write_text(wanted, "utf-8")
    return python


def english() -> Path:
    """data/english, prepared first where it is missing."""
    folder = ROOT / "data" / "english"
    if not (folder / "manifest.json").is_file():
        say(f"preparing {folder.relative_to(ROOT)}")
        command = ["prepare", "bundled:english", "--output", str(folder), "tokenizer.vocab_size=8192"]
        subprocess.run([sys.executable, "-m", "shardwright", *command], cwd=ROOT, check=True)
    return folder


def peer_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the peers as pinned."""
    pins = dict(line.split("==", 1) for line in REQUIREMENTS.read_text("utf-8").splitlines() if "==" in line)
    return {name: pins[name] for name in names}


def machine(device: str = "cpu") -> dict[str, str]:
    """What the figures were measured on and with."""
    import torch

    from shardwright.hardware import device_name

    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "processor": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "instructions": ", ".join(_instructions()) or "plain",
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "torch": torch.__version__,
    }
    if device == "cuda":
        facts = {"GPU": device_name(torch.device("cuda", 0)), **facts}
    return facts


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _instructions() -> list[str]:
    """Matrix and vector instructions of this processor that decide what a step can reach."""
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16")
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in known if flag in flags]


def commit() -> str:
    """The commit that was measured, with a + where the tree differs from it."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--", "shardwright", "configs", "setup.py")
    return (head or "no commit") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


# ---------------------------------------------------------------------------------------- taking turns


class Failed(RuntimeError):
    """A contender that could not run; the message ends with what it said last."""


class Contender:
    """A process that stays alive between its turns: it is sent one JSON line and answers with one."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", prefix=f"{name}-")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.facts = self._receive()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; Failed where the process died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: reading finds that out and says why
        return self._receive()

    def close(self) -> None:
        """End the process by closing its input, by force after ten seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self._process.wait()
        self._log.seek(0)
        last = "\n".join(self._log.read().strip().splitlines()[-15:])
        raise Failed(f"{self.name} ended with code {self._process.returncode}:\n{last}")


class Channel:
    """The child's end of a Contender. Whatever a library prints goes to stderr and cannot break the protocol."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **answer: Any) -> None:
        """One line to the parent."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def receive(self) -> dict[str, Any]:
        """The next request; ends the process where there is none."""
        line = sys.stdin.readline()
        if not line:
            # At once: a library's own shutdown may hang, and nothing is lost.
            os._exit(0)
        return dict(json.loads(line))


class Pace:
    """Lets a loop of steps run in turns: `tick` after each step waits when the turn is over.

    A request is {"warm": w, "steps": k}: w steps that do not count (caches are cold after the others' turns), then k.
    """

    def __init__(self, channel: Channel, wait: Callable[[], Any] = lambda: None) -> None:
        self._channel, self._wait = channel, wait
        self._request: dict[str, Any] = {}
        self._done, self._begin, self.total = 0, 0.0, 0

    def begin(self, **facts: Any) -> None:
        """Say what this contender is, and wait for the first turn."""
        self._channel.send(**facts)
        self._await()

    def tick(self, loss: Callable[[], float]) -> None:
        """A step is done; `loss` gives its loss where it is wanted."""
        self._done += 1
        self.total += 1
        if self._done == self._request["warm"]:
            self._start_clock()
        if self._done == self._request["warm"] + self._request["steps"]:
            self._wait()
            seconds = time.perf_counter() - self._begin
            steps, peak = self._request["steps"], peak_gib()
            self._channel.send(seconds=seconds, steps=steps, loss=loss(), steps_done=self.total, peak_gib=peak)
            self._await()

    def _await(self) -> None:
        self._request, self._done = self._channel.receive(), 0
        self._start_clock()

    def _start_clock(self) -> None:
        self._wait()
        self._begin = time.perf_counter()


def peak_gib() -> float:
    """Most memory that this process has held: of the GPU where torch used one, else of the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


Answers = dict[str, list[dict[str, Any]]]


def take_turns(turns: Sequence[tuple[Contender, dict[str, Any]]], rounds: int) -> Answers:
    """Answers by name. A B C A B C ...: what the machine does meanwhile meets all of them alike.

    A contender that fails is told of and leaves the rounds; one that never answered has no entry.
    """
    answers: Answers = {}
    left = list(turns)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for contender, request in list(left):
            try:
                answer = contender.ask(**request)
            except Failed as failed:
                say(f"left out: {failed}")
                left.remove((contender, request))
                continue
            answers.setdefault(contender.name, []).append(answer)
            say(f"  {contender.name:20s} " + " ".join(f"{key}={_short(value)}" for key, value in answer.items()))
    return answers


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------- results


class Spread(NamedTuple):
    """Median of several measurements, and the least and greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """From the values."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


# ------------------------------------------------------------------------------------------------- records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every record of a JSON lines file; what was cut off by a kill is left out."""
    records = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def add_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record, in one write so that jobs may share the file, on a line of its own whatever was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        cut = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(cut) + json.dumps(record).encode() + b"\n")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers, set to the right."""
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def facts_table(facts: Mapping[str, str]) -> str:
    """Two columns: what, and its value."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())])


def publish(path: Path | None, title: str, parts: Iterable[str], figures: Mapping[str, Any]) -> None:
    """Write the page (where a path is given), show it, and print the figures as the last line."""
    page = "\n\n".join([f"# {title}", *parts]) + "\n"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, "utf-8")
        say(f"wrote {path}")
    print(page)
    print(json.dumps(rounded(figures)), flush=True)


def rounded(value: Any) -> Any:
    """Floats to five significant digits, all the way down: what is printed should not claim more."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and each option with its default."""


def parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """A command line with what every benchmark takes: --out and --smoke."""
    found = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    found.add_argument("--out", type=Path, default=RESULTS / results, help="page to write")
    found.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs; writes no page")
    return found


if __name__ == "__main__":
    parser_ = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser_.parse_args()
    print(peers_python())
