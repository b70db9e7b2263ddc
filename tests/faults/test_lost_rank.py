"""kill -9 of any one rank: the others stop within 30 s, one line names who is gone, and nothing is left running."""

import datetime
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml

from tests.equivalence.cells import config

MARK = "SHARDWRIGHT_TEST_MARK"
SIZE = 4
LIMIT_S = 30.0
# Each costs half a minute: all of them in continuous integration, another one every day elsewhere.
KILLED = range(SIZE) if os.environ.get("CI") else [datetime.date.today().toordinal() % SIZE]


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


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for processes left behind")
@pytest.mark.faults
@pytest.mark.parametrize("rank", KILLED)
def test_killing_a_rank_leaves_nothing_but_a_message(rank, prepared, tmp_path):
    raw = config(prepared, tmp_path / "run")
    raw["train"] |= {"steps": 100_000}
    raw["data"] |= {"workers": 1}
    raw["parallel"] = {"tensor": 2} if rank % 2 else {"pipeline": 2}
    path, output, mark = tmp_path / "config.yaml", tmp_path / "output", uuid.uuid4().hex
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
    with output.open("wb") as file:
        environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(
            [*command, "-m", "shardwright", "train", str(path)], stdout=file, stderr=file, env=environment
        )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: launcher.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2), 120)
        assert launcher.poll() is None, output.read_text()
        os.kill(rank_process(mark, rank), signal.SIGKILL)
        begin = time.monotonic()
        assert launcher.wait(LIMIT_S) != 0
        wait_for(lambda: not marked(mark), LIMIT_S - (time.monotonic() - begin))
    finally:
        launcher.kill()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    text = output.read_text()
    lines = [line for line in text.splitlines() if line.startswith("shardwright: rank ")]
    assert len(lines) == 1, text
    assert re.match(rf"shardwright: rank {rank} on \S+ \(pid \d+\) is gone: killed or crashed", lines[0]), lines[0]
    assert f"rank      : {rank} (local_rank: {rank})" in text and "exitcode  : -9" in text
