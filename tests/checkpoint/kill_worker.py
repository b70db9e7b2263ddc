"""A process that saves checkpoints and is killed with SIGKILL, run by test_kill.py; prints one JSON object.

It imports torch once and forks a child for each kill. `everywhere` kills a child at its 1st, 2nd, 3rd ... operation on
the file system (counted by an audit hook), until one child gets through: no point between two operations is left out.
`random` kills children at random moments, also in the middle of writing a file. After each kill the folder must hold a
checkpoint that is whole, correct to the bit, and no older than the last one that the child knew to be finished; and
the next save must work and clean up.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from shardwright.checkpoint import CheckpointWriter, find_newest, load, read_latest

RANDOM_KILLS = 6
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


def tensors(value: int, size: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((size,), float(value)), "b": torch.full((3, 5), float(value))}


def build_start(folder: Path, size: int) -> None:
    with CheckpointWriter(folder, asynchronous=False) as writer:
        for value, step in ((1, 10), (2, 20)):
            writer.save(tensors(value, size), {"value": value}, step=step)


def child(folder: Path, size: int, pipe: int, rounds: int, kill_at: int | None) -> None:
    """Save again and again: a new step, the same step once more, and so on, deleting old ones."""
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if kill_at is not None and event in OPERATIONS:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.write(pipe, bytes([2]))
    writer = CheckpointWriter(folder, keep_last=2)
    sys.addaudithook(hook)
    for i in range(rounds):
        writer.save(tensors(3 + i, size), {"value": 3 + i}, step=20 + 10 * ((i + 1) // 2))
        writer.wait()
        os.write(pipe, bytes([3 + i]))
    os._exit(0)


def run_child(
    folder: Path, size: int, rounds: int, *, kill_at: int | None = None, delay: float = 0
) -> tuple[bool, int]:
    """(whether the child was killed, value of the last save that it finished)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            child(folder, size, writing, rounds, kill_at)
        finally:
            os._exit(3)
    os.close(writing)
    if kill_at is None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    finished = os.read(reading, 4096)[-1]
    os.close(reading)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status), finished


def check(folder: Path, size: int, finished: int) -> list[str]:
    """The folder after a kill, and after the save that follows; returns the reasons of what was skipped."""
    path, skipped = find_newest(folder, deep=True)
    assert path is not None, f"nothing to resume from: {sorted(os.listdir(folder))}"
    fresh = tensors(0, size)
    value = load(path, fresh)["value"]
    assert finished <= value <= finished + 1, (value, finished)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in tensors(value, size).items())
    assert not (folder / "latest").exists() or read_latest(folder) is not None, "latest names what is not whole"
    with CheckpointWriter(folder, keep_last=2, asynchronous=False) as writer:
        writer.save(tensors(99, size), {"value": 99}, step=990)
    assert find_newest(folder, deep=True) == (folder / "step_00000990", [])
    left = sorted(name for name in os.listdir(folder) if not name.startswith("step_"))
    assert left == ["latest"], left
    return [reason for _, reason in skipped]


def main(mode: str, root: Path) -> None:
    torch.set_num_threads(1)
    size, rounds, tries, reasons = (50, 2, 400, []) if mode == "everywhere" else (3_000_000, 250, 30, [])
    build_start(root / "start", size)
    rng, count = random.Random(0), 0
    for number in range(1, tries + 1):
        folder = root / f"run{number}"
        shutil.copytree(root / "start", folder)
        options = {"kill_at": number} if mode == "everywhere" else {"delay": rng.uniform(0.05, 0.6)}
        killed, finished = run_child(folder, size, rounds, **options)  # type: ignore[arg-type]
        reasons += check(folder, size, finished)
        shutil.rmtree(folder)
        count += killed
        # At random moments a child may be done before, on a machine that is busy with something else.
        if (count == RANDOM_KILLS) if mode == "random" else not killed:
            break
    print(json.dumps({"kills": count, "got_through": not killed, "skipped": sorted(set(reasons))}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
