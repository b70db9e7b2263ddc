"""Faults at random moments of launched runs, and what each came to.

Under benchmarks/faults.py, which repeats them, and test_faults.py, which has each once: one implementation for both.
A fault is a function of a `Stage`; it starts the real `shardwright launch`, strikes, and sees the run to its end.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardwright.checkpoint import find_newest
from shardwright.checkpoint.folder import why_not_whole
from tests import netns
from tests.conftest import first_documents
from tests.data.test_remote import Site
from tests.equivalence import work
from tests.equivalence.cells import LOSS, config, relative
from tests.faults.launched import Launch, expected_sequences, kill_agent, kill_keeper, kill_rank, over_hosts
from tests.faults.test_lost_rank import marked, wait_for

EVERY, PAUSE_S, BATCH = 4, 0.1, 8  # steps between checkpoints, length of a step, sequences in it
START_S = 4.0  # of a rank, until it is about to step
LEASE_S = 8.0  # after which a silent host is lost
LANES = {"data": {"lanes": 2, "shuffle_block": 8}}  # with these each sequence is of another small shard
STREAMED_STEPS = 1  # after these, shards are still to be fetched
DISK_MIB = 24


@dataclass
class Outcome:
    """What a fault came to; times in seconds, NaN where there was nothing of the kind."""

    moment: str
    detected_s: float  # until the first line about it
    resumed_s: float  # until a step that was not done before
    steps_lost: int  # done again
    data_lost: int  # sequences that a step lacks, or has beside its own
    difference: float  # largest of any step's loss, relative to the uninterrupted run
    message: str
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing but time was lost."""
        return not self.problem and self.data_lost == 0 and self.difference < LOSS

    def record(self) -> dict[str, Any]:
        """As JSON, which has no NaN."""
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(self).items()}


@dataclass(frozen=True)
class Texts:
    """Prepared folders, and the metrics of the run over each that nothing happened to."""

    text: Path
    shards: Path
    curves: Mapping[Path, list[dict[str, Any]]]


class Stage:
    """One trial: the run's config, its random numbers, when it was struck, and what was heard of it."""

    def __init__(self, folder: Path, texts: Texts, steps: int, rng: random.Random, *, asynchronous: bool = True):
        self.folder, self.texts, self.steps, self.rng = folder, texts, steps, rng
        self.raw = run_config(texts.text, folder / "run", steps, asynchronous=asynchronous)
        self.moment, self.message = "", ""
        self.struck = self.detected = math.nan
        self.launch: Launch | None = None
        self._before = 0  # characters that it had printed when it was struck

    @contextmanager
    def started(self, *options: str, **more: Any) -> Iterator[Launch]:
        """The launch, ended with the block."""
        with Launch(self.folder, self.raw, *options, pause=PAUSE_S, **more) as self.launch:
            yield self.launch

    @contextmanager
    def over_network(self, hosts: int, *options: str) -> Iterator[tuple[Launch, netns.Network]]:
        """The launch over so many hosts of one process each."""
        with netns.network(self.folder / "net", hosts) as net:
            words = over_hosts(net, self.folder, 1, "--lost-after", f"{LEASE_S:g}s", "--rejoin", "1s", *options)
            with self.started(*words, prefix=net.within(netns.LOGIN)) as launch:
                yield launch, net

    def wait_moment(self, launch: Launch, first: int = 0, last: int | None = None) -> None:
        """Until a random part of a random step from `first` on has passed; 0 is the start, before the first step."""
        step, part = self.rng.randint(first, self.steps - 5 if last is None else last), self.rng.random()
        if step == 0:
            launch.wait_for(lambda: all(launch.pids("train", RANK=str(rank)) for rank in range(2)))
            self.moment = f"{START_S * part:.1f} s after the ranks were started"
            time.sleep(START_S * part)
        else:
            launch.wait_for(lambda: any(record["step"] >= step for record in launch.steps()))
            self.moment = f"{1e3 * PAUSE_S * part:.0f} ms after step {step}"
            time.sleep(PAUSE_S * part)

    def strike(self, act: Callable[[], Any]) -> Any:
        """Do it now."""
        assert self.launch is not None
        self.struck, self._before = time.time(), len(self.launch.text)
        return act()

    def hear(self, launch: Launch, pattern: str) -> None:
        """The first line after the strike in which this is found."""

        def find() -> str | None:
            lines = launch.text[self._before :].splitlines()
            return next((line for line in lines if re.search(pattern, line)), None)

        self.message = launch.wait_for(find)
        self.detected = time.time()

    def finish(self, launch: Launch) -> None:
        """AssertionError unless the run ends well."""
        code = launch.finish()
        assert code == 0, f"the launcher ended with {code}: {launch.text[-1500:]}"

    def outcome(self) -> Outcome:
        """Of the finished run."""
        assert self.launch is not None
        steps = self.launch.steps()
        made = {(r["attempt"], r["step"]) for r in steps}
        found, expected = self.launch.sequences(), expected_sequences(self.steps, BATCH)
        lost = sum(len(set(found.get(s, [])) ^ set(expected.get(s, []))) for s in {*found, *expected})
        lost += sum(len(numbers) - len(set(numbers)) for numbers in found.values())  # taken twice in a step
        return Outcome(
            moment=self.moment,
            detected_s=self.detected - self.struck,
            resumed_s=self._resumed(steps) - self.struck,
            steps_lost=len(made) - len({step for _, step in made}),
            data_lost=lost,
            difference=self._difference(),
            message=self.plain(self.message),
        )

    def plain(self, text: str) -> str:
        """In one line, without the place of this trial."""
        return " ".join(text.replace(f"{self.folder}/", "").split())

    def _resumed(self, steps: Sequence[Mapping[str, Any]]) -> float:
        """When the first step was done that the attempt which was struck had not done; without another, any step."""
        struck = max((r["attempt"] for r in steps if r["time"] <= self.struck), default=-1)
        again = any(r["attempt"] > struck for r in steps) and struck >= 0
        before = max((r["step"] for r in steps if r["attempt"] <= struck), default=0) if again else 0
        new = [r["time"] for r in steps if r["step"] > before and r["time"] > self.struck]
        return min(new, default=math.nan)

    def _difference(self) -> float:
        """Of every loss and evaluation; infinite where a record is missing or one too many is there."""
        assert self.launch is not None
        own, other = self.launch.records(), self.texts.curves[self._text()]
        keys = [[(r["step"], "loss" in r) for r in records] for records in (own, other)]
        if keys[0] != keys[1]:
            return math.inf
        names = ["loss" if "loss" in record else "val_loss" for record in other]
        return max(relative(a[name], b[name]) for a, b, name in zip(own, other, names, strict=True))

    def _text(self) -> Path:
        return self.texts.text if self.raw["data"]["path"] == str(self.texts.text) else self.texts.shards


def run_config(text: Path, run: Path, steps: int, *, asynchronous: bool = True) -> dict[str, Any]:
    """A run that saves every few steps."""
    raw = config(text, run)
    raw["train"] |= {"steps": steps}
    raw["checkpoint"] |= {"every": EVERY, "asynchronous": asynchronous}
    return raw


# ----------------------------------------------------------------------------------------- processes and hosts


def lose_rank(stage: Stage) -> None:
    """kill -9 of a rank."""
    _lose(stage, partial(kill_rank, rank=stage.rng.randrange(2)), "lost rank")


def lose_agent(stage: Stage) -> None:
    """kill -9 of torchrun's agent."""
    _lose(stage, kill_agent, "lost the agent")


def lose_keeper(stage: Stage) -> None:
    """kill -9 of what the launcher runs on each host."""
    _lose(stage, kill_keeper, "lost host")


def _lose(stage: Stage, kill: Callable[[Launch], None], words: str) -> None:
    with stage.started("--nproc", "2") as launch:
        stage.wait_moment(launch)
        stage.strike(lambda: kill(launch))
        stage.hear(launch, words)
        stage.finish(launch)


def lose_host(stage: Stage) -> None:
    """The power of a host fails; it comes back a little later."""
    with stage.over_network(2) as (launch, net):
        host = stage.rng.choice(net.hosts)
        stage.wait_moment(launch)
        stage.strike(lambda: net.kill(host))
        stage.hear(launch, "lost host")
        net.boot(host)
        stage.finish(launch)


def lose_host_with_spare(stage: Stage, lose: Callable[[netns.Network, str], None] = netns.Network.kill) -> None:
    """A host is lost; the layout takes two of three hosts, and the third is taken in."""
    stage.raw["parallel"] = {"tensor": 2, "data": 1}
    with stage.over_network(3, "--min-nodes", "2", "--rejoin", "never") as (launch, net):
        assert launch.wait_line("starting") == "starting with 2 of 3 hosts, 2 processes; spare: h2"
        host = stage.rng.choice(net.hosts[:2])
        stage.wait_moment(launch)
        stage.strike(lambda: lose(net, host))
        stage.hear(launch, "lost host")
        assert "with 2 of 3 hosts, 2 processes" in launch.wait_line("attempt 2")
        stage.finish(launch)


# --------------------------------------------------------------------------------------------------- network


def cut_long(stage: Stage) -> None:
    """The cable of a host is pulled for longer than the timeout."""
    with stage.over_network(2) as (launch, net):
        host = stage.rng.choice(net.hosts)
        stage.wait_moment(launch, first=1)
        stage.strike(lambda: net.cut(host))
        stage.hear(launch, "lost host")
        time.sleep(stage.rng.uniform(0.0, LEASE_S))
        net.mend(host)
        stage.finish(launch)


def cut_apart(stage: Stage) -> None:
    """The hosts do not reach each other for longer than the ranks' own timeout; the launcher reaches all of them."""
    stage.raw["watch"] = {"every": "1s", "timeout": f"{LEASE_S:g}s"}
    with stage.over_network(2) as (launch, net):
        stage.wait_moment(launch, first=1)
        stage.strike(net.part)
        stage.hear(launch, "^shardwright: .*(stalled|lost|gone)")
        time.sleep(stage.rng.uniform(0.0, LEASE_S))
        net.part(False)
        stage.finish(launch)


Happening = Callable[[Stage, netns.Network, str], str]


def bear(stage: Stage, happenings: Sequence[Happening]) -> None:
    """What the network of a host does is less than a loss, and the run just goes on."""
    with stage.over_network(2) as (launch, net):
        host = stage.rng.choice(net.hosts)
        stage.wait_moment(launch, first=1)
        words = stage.strike(lambda: [happening(stage, net, host) for happening in happenings])
        stage.finish(launch)
        stage.message = f"none, of {' and '.join(words)}"
        _just_went_on(launch)


def cut_short(stage: Stage, net: netns.Network, host: str) -> str:
    """The cable is pulled for less than the timeout."""
    seconds = stage.rng.uniform(0.5, 0.5 * LEASE_S)
    net.cut(host)
    time.sleep(seconds)
    net.mend(host)
    return f"a cut of {seconds:.1f} s"


def slow_link(stage: Stage, net: netns.Network, host: str) -> str:
    """The link gets slow, and loses packets, until the end of the run."""
    delay, loss = stage.rng.uniform(5, 50), stage.rng.uniform(0.5, 3)
    net.slow(host, delay, loss)
    return f"{delay:.0f} ms each way with {loss:.1f} % of the packets lost"


def _just_went_on(launch: Launch) -> None:
    assert not [line for line in launch.lines if "lost" in line or "attempt" in line], launch.text


# ---------------------------------------------------------------------------------------- signals and the disk


def stop_and_start(stage: Stage) -> None:
    """SIGTERM to the launcher; the same command again."""
    with stage.started("--nproc", "2") as launch:
        stage.wait_moment(launch, first=1)
        stage.strike(lambda: launch.process.send_signal(signal.SIGTERM))
        stage.hear(launch, "^shardwright: SIGTERM")
        assert launch.finish() == 75, launch.text
    with stage.started("--nproc", "2") as launch:
        stage.finish(launch)


def fill_disk(stage: Stage) -> None:
    """The disk of the run folder is full when a checkpoint is saved; once that is said, it is freed or enlarged."""
    disk = stage.folder / "disk"
    with small_disk(disk, DISK_MIB) as mounted:
        stage.raw["run"] = str(disk / "run")
        with stage.started("--nproc", "2") as launch:
            stage.wait_moment(launch, first=1)
            room, enlarged = stage.rng.choice((0, stage.rng.randrange(1 << 20))), stage.rng.random() < 0.5
            stage.moment += f", {room >> 10} KiB left"
            ballast = stage.strike(lambda: fill(disk, room))
            stage.hear(launch, "[Nn]o space left")
            if enlarged:
                subprocess.run(["mount", "-o", f"remount,size={2 * DISK_MIB}m", str(mounted)], check=True)
            else:
                ballast.unlink()
            stage.finish(launch)
        shutil.copytree(disk / "run", stage.folder / "run")
        launch.run = stage.folder / "run"


@contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path]:
    """A tmpfs of so many MiB; needs root."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, room: int) -> Path:
    """Leave `room` bytes of a file system; the file that takes the rest."""
    ballast, left = disk / "ballast", shutil.disk_usage(disk).free - room
    with ballast.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(left, 1))
    return ballast


def why_no_disk() -> str | None:
    """Why there can be no small disk here; None where there can."""
    return None if sys.platform.startswith("linux") and os.geteuid() == 0 else "a small tmpfs needs root on Linux"


def tear_checkpoint(stage: Stage) -> None:
    """Everything is killed, and a file of the newest checkpoint cut off at a random byte, or one byte of it changed."""
    folder = Path(stage.raw["run"]) / "checkpoints"
    with stage.started("--nproc", "2") as launch:
        stage.wait_moment(launch, first=2 * EVERY + 1)
        launch.wait_for(lambda: len(whole(folder)) >= 2)
        os.kill(launch.process.pid, signal.SIGKILL)
        wait_for(lambda: not marked(launch.mark), 60)
    newest = find_newest(folder)[0]
    assert newest is not None
    stage.moment += f", {tear(newest, stage.rng)}"
    with stage.started("--nproc", "2") as launch:
        stage.strike(lambda: None)
        stage.hear(launch, rf"{newest.name}.*(passed over|going on from)")
        stage.finish(launch)


def whole(folder: Path) -> list[Path]:
    """Whole checkpoints."""
    return [path for path in folder.glob("step_*") if why_not_whole(path) is None]


def tear(checkpoint: Path, rng: random.Random) -> str:
    """Cut a random file of it off at a random byte, or change that byte; in words."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    place = rng.randrange(path.stat().st_size)
    name = f"{checkpoint.name}/{path.relative_to(checkpoint)}"
    if rng.random() < 0.7:
        os.truncate(path, place)
        return f"{name} cut off at byte {place:,}"
    data = bytearray(path.read_bytes())
    data[place] ^= 1 + rng.randrange(255)
    path.write_bytes(data)
    return f"{name} with byte {place:,} changed"


# ------------------------------------------------------------------------------------------- a server of shards


def bad_server(stage: Stage, kinds: Sequence[str]) -> None:
    """The first answers of a server for each shard from now on are bad ones, up to three in a row."""
    site = Site(stage.texts.shards)
    stage.raw["data"] |= {"path": site.url, "cache": str(stage.folder / "cache"), **LANES["data"]}
    try:
        with stage.started("--nproc", "2") as launch:
            stage.wait_moment(launch, last=STREAMED_STEPS)
            stage.strike(lambda: spoil(site, kinds, stage.rng))
            stage.hear(launch, "/train/.*; attempt 1 of")
            stage.finish(launch)
            _just_went_on(launch)
    finally:
        site.close()


def spoil(site: Site, kinds: Sequence[str], rng: random.Random) -> None:
    """Have it answer badly for each file, once to three times."""
    for path in site.folder.rglob("*"):
        if path.name != "manifest.json":
            site.fail(f"/{path.relative_to(site.folder)}", *rng.choices(kinds, k=rng.randint(1, 3)))


@dataclass(frozen=True)
class Fault:
    """One kind: its name in a table, what does it, and why it cannot be had here."""

    name: str
    happen: Callable[[Stage], None]
    why_not: Callable[[], str | None] = lambda: None

    def trial(self, stage: Stage) -> Outcome:
        """Let it happen once; a failed trial is an outcome, too."""
        try:
            self.happen(stage)
        except Exception as error:
            text = stage.plain(str(error)) or f"not as expected: {traceback.extract_tb(error.__traceback__)[-1].line}"
            message = stage.plain(stage.message)
            return Outcome(stage.moment, math.nan, math.nan, 0, 0, math.nan, message, text[-600:])
        return stage.outcome()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("rank killed", lose_rank),
        Fault("agent killed", lose_agent),
        Fault("keeper killed", lose_keeper),
        Fault("host lost", lose_host, netns.why_not),
        Fault("host lost, a spare", lose_host_with_spare, netns.why_not),
        Fault("network cut, long", cut_long, netns.why_not),
        Fault("hosts cut apart", cut_apart, netns.why_not),
        Fault("network cut, short", partial(bear, happenings=[cut_short]), netns.why_not),
        Fault("slow link", partial(bear, happenings=[slow_link]), netns.why_not_slow),
        Fault("SIGTERM", stop_and_start),
        Fault("disk full", fill_disk, why_no_disk),
        Fault("checkpoint torn", tear_checkpoint),
        Fault("server: errors", partial(bad_server, kinds=["500"])),
        Fault("server: cut bodies", partial(bad_server, kinds=["truncate"])),
        Fault("server: wrong bytes", partial(bad_server, kinds=["wrong bytes"])),
    )
}


# ----------------------------------------------------------------------------------------------------- texts


def prepare_shards(folder: Path) -> Path:
    """A text as a few hundred small shards, more than a run fetches at its start; made where it is missing."""
    from shardwright.config import parse
    from shardwright.data.prepare import PrepareConfig, prepare

    output = folder / "shards"
    if not (output / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "long.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in first_documents("english", 250)), "utf-8")
        raw = {
            "input": [str(source)], "output": str(output), "tokenizer": {"vocab_size": 512}, "validation_every": 50,
            "shard_tokens": 1024, "workers": 1,
        }  # fmt: skip
        prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    return output


def curve(text: Path, run: Path, steps: int, more: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the uninterrupted run, in this process; made where they are missing."""
    raw = run_config(text, run, steps)
    for section, keys in more.items():
        raw[section] |= keys
    return work.run(raw, [])


def build_texts(text: Path, folder: Path, steps: int, *, shards: bool = True) -> Texts:
    """Both texts and their curves, in `folder`; without `shards` one of them."""
    curves = {text: curve(text, folder / "reference", steps, {})}
    many = folder / "shards"
    if shards:
        many = prepare_shards(folder)
        curves[many] = curve(many, folder / "reference-shards", steps, LANES)
    return Texts(text, many, curves)
