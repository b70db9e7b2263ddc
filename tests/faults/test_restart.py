"""`launch` on one machine: stopped by SIGTERM with all saved; kill -9 of a rank, of the agent, of the launcher itself.

After each the loss curve and the sequence numbers are those of the run that nothing happened to.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shardwright.train.folder import FolderLock
from shardwright.train.metrics import read_metrics
from tests.equivalence import work
from tests.equivalence.cells import LOSS, config, relative
from tests.faults.launched import Launch, expected_sequences, kill_agent, kill_keeper, kill_rank
from tests.faults.test_lost_rank import marked, wait_for

STEPS = 8
FAULTS = {
    "rank": (lambda launch: kill_rank(launch, 1), "lost rank 1 on this machine (local rank 1, pid "),
    "agent": (kill_agent, "lost the agent on this machine: killed by SIGKILL"),
    "keeper": (kill_keeper, "lost host this machine: "),
}

pytestmark = [
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for processes left behind"),
    pytest.mark.faults,
    pytest.mark.timeout(900),  # on a machine that does other things too
]


def run_config(prepared, run: Path, steps: int = STEPS):
    """A run of a few steps that saves every fourth."""
    raw = config(prepared, run)
    raw["train"] |= {"steps": steps}
    raw["checkpoint"] |= {"every": 4}
    return raw


def check(launch: Launch, uninterrupted: Path, steps: int = STEPS) -> None:
    """AssertionError unless the curve and the data of a finished launch are those of the uninterrupted run."""
    found, expected = launch.records(), read_metrics(uninterrupted)
    assert [r["step"] for r in found if "loss" in r] == list(range(1, steps + 1))
    for mine, theirs in zip(found, expected, strict=True):
        name = "loss" if "loss" in theirs else "val_loss"
        assert relative(mine[name], theirs[name]) < LOSS, (mine, theirs)
    assert launch.sequences() == expected_sequences(steps, 8)


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """The same run in one process, without a launcher."""
    run = tmp_path_factory.mktemp("one") / "run"
    work.run(run_config(prepared, run), [])
    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_stopped_and_killed_and_the_same_curve(fault, prepared, uninterrupted, tmp_path):
    raw = run_config(prepared, tmp_path / "run")
    with Launch(tmp_path, raw, "--nproc", "2", hold=[2]) as launch:
        launch.wait_held(2)
        launch.process.send_signal(signal.SIGUSR1)
        launch.wait_line("SIGUSR1: the run finishes its step and saves")
        launch.release(2)
        assert launch.finish() == 75, launch.text
        assert "all saved; the same command goes on" in launch.text
    kill, words = FAULTS[fault]
    with Launch(tmp_path, raw, "--nproc", "2", hold=[6]) as launch:
        launch.wait_held(6)
        kill(launch)
        launch.wait_line(words)
        launch.release(6)
        assert launch.wait_line("attempt 2") == "attempt 2 (restart 1 of 3) 2 processes, from step_00000004"
        assert launch.finish() == 0, launch.text
        check(launch, uninterrupted)


def test_a_folder_in_which_another_run_works_ends_the_launch_at_once(prepared, tmp_path):
    raw = run_config(prepared, tmp_path / "run")
    with FolderLock() as lock:
        lock.take(tmp_path / "run")
        with Launch(tmp_path, raw, "--nproc", "2") as launch:
            assert launch.finish() == 2, launch.text
    assert f"process {os.getpid()} trains in it; wait for it or stop it" in launch.text
    assert [line for line in launch.lines if line.startswith(("attempt", "lost"))] == []


def test_a_mistake_is_not_repeated_and_a_killed_launcher_leaves_nothing(prepared, tmp_path):
    raw = run_config(prepared, tmp_path / "run")
    too_long = {**raw, "data": {**raw["data"], "sequence_length": 128}}  # than the model's positions, as the rank finds
    with Launch(tmp_path, too_long, "--nproc", "1") as launch:
        assert launch.finish() == 2, launch.text
        assert "attempt 2" not in launch.text and "data.sequence_length=128" in launch.text
    with Launch(tmp_path, raw, "--nproc", "1", hold=[1]) as launch:
        launch.wait_held(1)
        assert len(launch.pids("train")) >= 1
        os.kill(launch.process.pid, signal.SIGKILL)
        wait_for(lambda: not marked(launch.mark), 30)
