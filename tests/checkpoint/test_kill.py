"""kill -9 during a save, in real processes: at every operation on the file system, and at random moments."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardwright

pytestmark = pytest.mark.faults


def run(mode: str, folder: Path) -> dict:
    worker = Path(__file__).parent / "kill_worker.py"
    environment = os.environ | {"PYTHONPATH": str(Path(shardwright.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, worker, mode, folder], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where possible: a kill leaves there what it leaves on a disk, and hundreds of fsyncs cost nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def test_killed_at_any_operation_a_whole_checkpoint_stands(folder: Path) -> None:
    found = run("everywhere", folder)
    assert found["got_through"] and found["kills"] > 50
    assert "a save that was interrupted, or goes on" in found["skipped"]


def test_killed_at_random_moments_a_whole_checkpoint_stands(folder: Path) -> None:
    assert run("random", folder)["kills"] == 6
