"""Heartbeats: what a rank says of itself, when it counts as stalled, and that it costs the step nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwright.config import ConfigError
from shardwright.train.metrics import read_metrics
from shardwright.train.run import Run, train
from shardwright.train.stall import Word, read_stacks
from shardwright.train.watch import Phase, Standstill, Watch, spy, stall_timeout


def heartbeat(run: str) -> dict:
    return json.loads((Path(run) / "watch" / "000" / "rank_00000.json").read_text())


def test_a_run_leaves_its_last_word(tiny):
    config = tiny("watch.every=1s")
    train(config)
    word = heartbeat(config.run)
    assert (word["rank"], word["pid"], word["left"], word["stalled"]) == (0, os.getpid(), True, False)
    assert (word["step"], word["phase"]) == (7, "end")
    assert Word.of(word).place == (7, 6, word["passes"])
    assert [p.name for p in (Path(config.run) / "watch" / "000").iterdir()] == ["rank_00000.json"]


def test_it_says_where_the_run_is(tiny, monkeypatch):
    """Phase, step, micro-batch and sequences, as a thread sees them from outside."""
    seen = []
    run_step, config = Run._one_step, tiny("train.steps=2")

    def look(run: Run) -> None:
        accumulate = run.step.accumulate

        def watched(*given):
            accumulate(*given)
            seen.append((run.watch.phase, *run._where()))

        monkeypatch.setattr(run.step, "accumulate", watched)
        run_step(run)

    monkeypatch.setattr(Run, "_one_step", look)
    train(config)
    assert seen[:2] == [("step", 1, 2, (0, 3)), ("step", 2, 2, (4, 7))]


def test_without_a_timeout_there_is_no_thread_and_no_file(tiny):
    config = tiny("watch.timeout=null")
    train(config)
    assert len(read_metrics(Path(config.run))) and not (Path(config.run) / "watch").exists()


@pytest.mark.parametrize(
    ("settings", "size", "seconds"),
    [((), 1, 600.0), ((), 2, 480.0), (("parallel.timeout=60s",), 4, 48.0), (("watch.timeout=7s",), 4, 7.0),
     (("watch.timeout=null",), 4, None)],
)  # fmt: skip
def test_a_stall_is_found_before_collectives_give_up(tiny, settings, size, seconds):
    assert stall_timeout(tiny(*settings), size) == seconds


@pytest.mark.parametrize("setting", ["watch.every=soon", "watch.timeout=0s"])
def test_durations_are_checked(tiny, setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        tiny(setting)


class Still(Phase):
    """A run of which a test moves the hands."""

    place = (1, 0, None)

    def where(self):
        return self.place


def test_what_moves_is_not_still_and_a_pause_of_the_watcher_does_not_count(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run, found = Still(), Standstill()

    def after(seconds: float) -> float:
        clock[0] += seconds
        return found.look(run)

    assert after(1) == 0 and after(1) == 1 and after(1) == 2
    assert after(3600) == 12, "the process was suspended: it counts as ten looks"
    run.place = (1, 1, None)
    assert after(1) == 0 and after(2) == 2
    run.enter("save")
    assert after(1) == 0


def test_stacks_have_the_main_thread_first_and_the_line():
    stacks, collective, backward = read_stacks()
    assert stacks[0].thread == "MainThread" and collective is None and not backward
    assert any("test_stacks_have_the_main_thread" in frame for frame in stacks[0].frames)


@pytest.mark.parametrize("raw", [{}, {"rank": 1}])
def test_a_torn_heartbeat_is_none(raw):
    with pytest.raises(ValueError, match="not a heartbeat"):
        Word.of(raw)


def test_py_spy_says_why_it_sees_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert "py-spy is not installed" in spy(os.getpid())
    fake = tmp_path / "py-spy"
    fake.write_text("#!/bin/sh\necho 'Permission Denied' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda *_, **__: str(fake))
    assert "Permission Denied" in spy(1) and "right to ptrace" in spy(1)


HANG = """
import sys, threading
from shardwright.train.run import Run
from shardwright.launcher.cli import run
step = Run._one_step
def hang(self):
    if self.position.step == 2:
        threading.Event().wait()
    step(self)
Run._one_step = hang
sys.exit(run(["train", sys.argv[1]]))
"""


def test_one_process_that_hangs_leaves_with_a_page(tiny, tmp_path):
    from shardwright.config import to_yaml

    config = tiny("watch.every=1s", "watch.timeout=3s")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "c.yaml")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("shardwright: ")]
    (line,) = lines or [done.stderr]
    assert "stalled: rank 0 on " in line and " is between steps after step 2 since " in line
    (page,) = (Path(config.run) / "watch").glob("stall_*.html")
    assert "hang" in page.read_text() and "&lt;string&gt;:8 hang" in page.read_text()


def test_what_cannot_be_written_does_not_end_the_run(tiny, monkeypatch):
    write = Path.write_text

    def refuse(path: Path, *given, **named):
        if path.parent.parent.name == "watch":
            raise OSError(28, "No space left on device")
        return write(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert train(tiny("watch.every=1s")).step == 6


def test_the_word_costs_the_step_nothing():
    phase, count = Phase(), 20_000
    begin = time.thread_time()
    for _ in range(count):
        phase.enter("data")
    assert (time.thread_time() - begin) / count < 20e-6
    assert issubclass(Watch, Phase)
