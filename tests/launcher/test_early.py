"""Signals that come before training begins: one line, and the exit code of the signal."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwright.launcher.cli import run
from shardwright.launcher.early import leaving_at_once

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
