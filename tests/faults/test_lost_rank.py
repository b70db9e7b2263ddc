"""kill -9 of any one rank: the others stop within 30 s, one line names who is gone, and nothing is left running.

Also before the ranks have met, where torchrun's report names it, and in `verify`.
"""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from tests.equivalence.cells import config

MARK = "SHARDWRIGHT_TEST_MARK"
SIZE = 4
LIMIT_S = 30.0


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Environments of the living processes that carry the mark, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                pair.split("=", 1) for pair in (folder / "environ").read_text().split("\0") if "=" in pair
            )
            dead = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except (OSError, UnicodeDecodeError):
            continue
        if environment.get(MARK) == mark and not dead:
            found[int(folder.name)] = environment
    return found


def wait_for(condition, seconds: float):
    """What `condition()` gives once it is true; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return answer


def rank_process(mark: str, rank: int) -> int:
    """The process of a rank: the oldest that has its number, its loader workers being younger."""
    return min(pid for pid, environment in marked(mark).items() if environment.get("RANK") == str(rank))


@contextmanager
def launched(folder: Path, raw, size: int, command: str):
    """torchrun with `size` ranks of `shardwright COMMAND` over this config; (launcher, mark, output). None is left."""
    path, output, mark = folder / "config.yaml", folder / "output", uuid.uuid4().hex
    path.write_text(yaml.safe_dump(raw))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    with output.open("wb") as file:
        environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(
            [*start, "-m", "shardwright", *command.split(), str(path)], stdout=file, stderr=file, env=environment
        )
    try:
        yield launcher, mark, output
    finally:
        launcher.kill()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def kill_and_wait(launcher: subprocess.Popen[bytes], mark: str, rank: int) -> None:
    """Kill a rank; AssertionError unless everything has ended in LIMIT_S, and not in peace."""
    os.kill(rank_process(mark, rank), signal.SIGKILL)
    begin = time.monotonic()
    assert launcher.wait(LIMIT_S) != 0
    wait_for(lambda: not marked(mark), LIMIT_S - (time.monotonic() - begin))


pytestmark = [
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for processes left behind"),
    pytest.mark.faults,
]
GONE = r"shardwright: rank {rank} on \S+ \(pid \d+\) is gone: killed or crashed"


@pytest.mark.parametrize("rank", range(SIZE))
def test_killing_a_rank_leaves_nothing_but_a_message(rank, prepared, tmp_path):
    raw = config(prepared, tmp_path / "run")
    raw["train"] |= {"steps": 100_000}
    raw["data"] |= {"workers": 1}
    raw["parallel"] = {"tensor": 2} if rank % 2 else {"pipeline": 2}
    with launched(tmp_path, raw, SIZE, "train") as (launcher, mark, output):
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: launcher.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2), 120)
        assert launcher.poll() is None, output.read_text()
        kill_and_wait(launcher, mark, rank)
    text = output.read_text()
    lines = [line for line in text.splitlines() if line.startswith("shardwright: rank ")]
    assert len(lines) == 1, text
    assert re.match(GONE.format(rank=rank), lines[0]), lines[0]
    assert f"rank      : {rank} (local_rank: {rank})" in text and "exitcode  : -9" in text


def test_a_rank_that_dies_before_all_have_met(prepared, tmp_path):
    """The others wait for it inside of torch, where no handler of Python's runs."""
    with launched(tmp_path, config(prepared, tmp_path / "run"), 2, "train") as (launcher, mark, output):
        wait_for(lambda: {e.get("RANK") for e in marked(mark).values()} >= {"0", "1"}, 60)
        os.kill(rank_process(mark, 1), signal.SIGSTOP)
        waiting = psutil.Process(rank_process(mark, 0))
        wait_for(lambda: any(c.status == psutil.CONN_ESTABLISHED for c in waiting.net_connections("tcp")), 120)
        kill_and_wait(launcher, mark, 1)
    text = output.read_text()
    assert "shardwright: ended by SIGTERM before the first step; if another rank is gone" in text, text
    assert "rank      : 1 (local_rank: 1)" in text and "exitcode  : -9" in text


def test_a_rank_that_dies_in_verify(prepared, tmp_path):
    raw = config(prepared, tmp_path / "run")
    raw["train"] |= {"steps": 100_000}
    raw["parallel"] = {"tensor": 2}
    with launched(tmp_path, raw, 2, "verify --steps 2000") as (launcher, mark, output):
        wait_for(lambda: list(tmp_path.glob(".run.verify.*")), 120)  # both have met, and rank 0 says what they share
        kill_and_wait(launcher, mark, 1)
    lines = [line for line in output.read_text().splitlines() if line.startswith("shardwright: rank ")]
    assert len(lines) == 1 and re.match(GONE.format(rank=1), lines[0]), output.read_text()
