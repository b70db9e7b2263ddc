"""Signals that come before training begins: one line, and the exit code of the signal; and after it has ended: none."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwright.launcher.cli import run
from shardwright.launcher.early import leaving_at_once
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_while_torch_is_imported(name: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardwright", "train", "configs/debug/gpt2.yaml", f"run={tmp_path / 'run'}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while "libtorch" not in maps.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "")
    assert errors == f"shardwright: interrupted by {name} while no step was under way; nothing to save\n"


WAITING = """
from datetime import timedelta
import torch.distributed as dist
from shardwright.launcher.early import leaving_at_once
from shardwright.train import signals

signals.LINGER_S = 0.2
store = dist.TCPStore("127.0.0.1", 0, is_master=True)
with leaving_at_once(), signals.lingering(2):
    print("waiting", flush=True)
    store.wait(["what a lost rank would have set"], timedelta(seconds=120))
"""


def test_a_rank_that_waits_inside_of_torch_leaves_at_sigterm() -> None:
    """Python's own handlers run when the call returns, which nobody is left to make it do."""
    process = subprocess.Popen([sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        time.sleep(0.5)  # into the wait; a signal that comes before it would prove less, and nothing wrong
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("size", [1, 2])
def test_signals_after_the_last_save_change_nothing(size: int, prepared: Path, tmp_path: Path) -> None:
    """Until the process is gone: with several, torch has meshes to forget; each has its modules to unload."""
    command = [sys.executable, "-m", "shardwright", "train", "debug/gpt2", f"data.path={prepared}", "train.steps=2"]
    command += [f"run={tmp_path / 'run'}", "train.device=cpu"]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)] if size > 1 else [{}]
    started = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables})
        for variables in ranks
    ]
    try:
        first, *others = started
        assert first.stderr is not None
        said = list(itertools.takewhile(lambda line: "done: " not in line, first.stderr))
        for process in others:  # may not be quite as far
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while first.poll() is None and time.monotonic() < deadline:
            first.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        assert [process.wait(60) for process in started] == [0] * size, "".join(said)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with leaving_at_once():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_in_another_command_is_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardwright.train.score.evaluate_run", interrupted)
    assert run(["eval", "runs/any"]) == 130
    assert capsys.readouterr() == ("", "shardwright: interrupted\n")
