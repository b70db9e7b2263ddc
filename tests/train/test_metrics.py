"""metrics.jsonl, TensorBoard and the terminal lines: whole after a kill, cut at a resume, never doubled."""

import errno
import json
import logging
import math
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.config import ConfigError, RunError
from shardwright.hardware import Peak
from shardwright.log import get_logger
from shardwright.parallel.mesh import World
from shardwright.train.clock import Clock
from shardwright.train.metrics import (
    MetricsLog,
    Utilisation,
    read_metrics,
    read_starts,
    record_start,
    training_line,
    truncate,
    validation_line,
)
from shardwright.train.result import Result, write_result
from shardwright.train.schedule import Progress
from shardwright.train.writing import naming

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    get_logger().setLevel(logging.INFO)
    yield


def fields(step: int) -> dict[str, float | int]:
    """What the loop logs, with exact values that tell the step."""
    return {"tokens": 4096 * step, "loss": 5 / step, "grad_norm": 0.1 * step, "lr": 3e-4, "tokens_per_s": 1e4 + step}


def tensorboard_steps(folder: Path, tag: str) -> list[int]:
    """Steps of a tag as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_a_record_is_one_object_with_exact_numbers(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(10, {"loss": value, "tokens": 2**53, "mfu": None, "note": "a"})
        assert read_metrics(tmp_path) == [{"step": 10, "loss": value, "tokens": 2**53, "mfu": None, "note": "a"}]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1


def test_what_is_not_finite_stays_valid_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"step": 1, "loss": None, "grad_norm": None, "lr": 1.0, "nonfinite": "loss grad_norm"}


@settings(max_examples=50, deadline=None)
@given(last=st.integers(1, 30), resumed=st.integers(0, 30), torn=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_cut_keeps_whole_records_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory, last: int, resumed: int, torn: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": random.Random(seed + s).random()}) + "\n" for s in range(1, last + 1)]
    raw = "".join(lines)
    path.write_text(raw[: len(raw) - min(torn, len(raw))])
    whole = path.read_text().count("\n")
    truncate(path, resumed)
    assert path.read_text() == "".join(lines[: min(whole, resumed)])
    assert [f.name for f in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_cut_that_drops_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    truncate(path, 1)
    truncate(tmp_path / "absent.jsonl", 1)
    assert path.stat().st_ino == before
    path.write_text('{"step": 1}\nnot a record\n{"loss": 1}\n{"step": 2}\n')
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_killed_run_goes_on_without_a_doubled_step(tmp_path: Path) -> None:
    """kill -9 after step 30 with the checkpoint at 20, restart within the same second, one step, look at once."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom shardwright.train.metrics import MetricsLog\n"
        "folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
        "log = MetricsLog(folder, first)\n"
        "for step in range(first + 1, last + 1):\n"
        "    log.log(step, {'loss': 1.0 / step, 'val_loss': 2.0})\n"
        "os.kill(os.getpid(), 9)\n"
    )

    def run(first: int, last: int) -> None:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(first), str(last)], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL

    run(0, 30)
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 31))
    assert tensorboard_steps(tmp_path, "train/loss") == list(range(1, 31)), "flushed at each record"
    events = next((tmp_path / "tensorboard").iterdir())
    events.write_bytes(events.read_bytes()[:-7])  # the kill tore the last event
    run(20, 20)
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 21))
    assert tensorboard_steps(tmp_path, "train/loss") == list(range(1, 21)), "right after the resume"
    assert tensorboard_steps(tmp_path, "validation/loss") == list(range(1, 21))
    run(20, 21)
    assert tensorboard_steps(tmp_path, "train/loss") == list(range(1, 22))
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1.0 / s for s in range(1, 22)]


def test_tensorboard_keeps_nothing_that_a_resume_dropped(tmp_path: Path) -> None:
    """Every reader: one file has events, whether it was watched all the time or is read anew; times are kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watching = EventAccumulator(str(tmp_path / "tensorboard"))
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.log(step, {"loss": 1.0 / step})
    watching.Reload()
    first = watching.Scalars("train/loss")
    assert [event.step for event in first] == [10, 20, 30, 40]
    for resumed, taken in ((20, 35), (35, 50)):
        with MetricsLog(tmp_path, resumed) as log:
            log.log(taken, {"loss": 1.0 / taken})
    watching.Reload()
    assert [event.step for event in watching.Scalars("train/loss")] == [10, 20, 35, 50]
    assert tensorboard_steps(tmp_path, "train/loss") == [10, 20, 35, 50]
    assert [event.wall_time for event in watching.Scalars("train/loss")][:2] == [e.wall_time for e in first][:2]
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert [file.stat().st_size > 0 for file in files] == [False, False, True]
    os.utime(files[0], (0, 0))
    MetricsLog(tmp_path, 50).close()
    assert not files[0].exists(), "one that every reader has passed"


def test_a_disk_too_full_for_tensorboard_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path) as log:
        log.log(1, fields(1))
        (events,) = (tmp_path / "tensorboard").iterdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 10, limits[1]))
        try:
            log.log(2, {"loss": 1.0})
            log.log(3, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("tensorboard: cannot be written: File too large; going on without TensorBoard") == 1
    assert failed == []
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    assert tensorboard_steps(tmp_path, "train/loss") == [1]


def test_a_file_in_the_place_of_tensorboards_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("")
    with MetricsLog(tmp_path) as log:
        log.log(1, fields(1))
    assert "tensorboard: cannot be written: File exists; going on without TensorBoard" in capfd.readouterr().err
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_a_folder_in_the_place_of_the_records(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: Is a directory; move away what stands"):
        MetricsLog(tmp_path, tensorboard=False)


def test_what_else_a_full_disk_stops_is_named(tmp_path: Path) -> None:
    progress = Progress("seconds", 60.0, [0.5])
    writers = {
        "starts.jsonl": lambda: record_start(tmp_path, 0),
        "clock.jsonl": lambda: Clock(tmp_path, progress, World()).record(0),
        ".result.json": lambda: write_result(tmp_path, Result("run", 1, 64, stopped=False)),
    }
    for name, write in writers.items():
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(RunError, match=rf"{name.lstrip('.')}: cannot be written: No space left.*; free space"):
            write()
    with pytest.raises(RunError, match=f"{tmp_path}: cannot be written: full; free space"), naming(tmp_path):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(ConnectionError), naming(tmp_path):
        raise ConnectionError(errno.ECONNRESET, "what is not about a disk stays what it is")


def test_a_run_without_a_checkpoint_starts_its_records_again(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.log(1, fields(1))
            log.log(2, fields(2))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    assert tensorboard_steps(tmp_path, "train/grad_norm") == [1, 2]
    assert tensorboard_steps(tmp_path, "speed/tokens_per_s") == [1, 2]


def test_a_full_disk_is_one_line_and_the_records_before_it_stay(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(1, fields(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, limits[1]))
        try:
            with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: .*free space"):
                log.log(2, fields(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1], "a torn record is not read"
    with MetricsLog(tmp_path, 1, tensorboard=False) as log:
        log.log(2, fields(2))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_a_rank_that_does_not_write_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path / "run", write=False) as log:
        log.log(1, fields(1))
        log.advance(1, 0.5)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_without_a_terminal_only_logged_steps_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path, total_steps=100, tensorboard=False) as log:
        for step in range(1, 101):
            log.advance(step, step / 100)
            if step % 50 == 0:
                log.log(step, fields(step) | {"mfu": 0.412, "mem_gib": 1.5})
        log.log(100, {"val_loss": 3.0, "val_perplexity": 20.1, "val_bits_per_byte": 1.9})
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 3
    assert re.fullmatch(
        r"step 50/100  loss 0\.1000  lr 3\.00e-04  grad 5  10\.0k tokens/s  mfu 41\.2%  1\.50 GiB  50 %  0:00 left",
        lines[0],
    )
    assert lines[2] == "step 100  validation loss 3.0000  perplexity 20.1  1.9000 bits per byte"


def test_quiet_prints_nothing_and_still_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_logger().setLevel(logging.WARNING)
    try:
        with MetricsLog(tmp_path, tensorboard=False) as log:
            log.log(1, fields(1))
    finally:
        get_logger().setLevel(logging.INFO)
    assert capsys.readouterr().err == ""
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_the_live_line_keeps_bar_and_time_left(tmp_path: Path, columns: int) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom shardwright.train.metrics import MetricsLog\n"
        "with MetricsLog(Path(sys.argv[1]), total_steps=100000, tensorboard=False) as log:\n"
        "    for step in range(12345, 12348):\n"
        "        log.log(step, {'loss': 2.5, 'lr': 3e-4, 'grad_norm': 0.81, 'tokens_per_s': 1.31e6, 'mfu': 0.412,\n"
        "                       'mem_gib': 61.25})\n"
        "        log.advance(step, step / 1e5)\n"
        "        time.sleep(0.1)\n"
    )
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", _shown(code, tmp_path, columns)))
    assert all(len(line) <= columns for line in lines)
    whole = [line for line in lines if "step 12347/100000" in line]
    assert whole, lines
    for line in whole:
        assert re.search(r"step 12347/100000  .*\S [━╺╸]{4,}.* 12 %  \d+:\d\d(:\d\d)? left", line), line
    assert ("61.25 GiB" in whole[-1]) == (columns == 140)


def _shown(code: str, folder: Path, columns: int) -> str:
    """What a script showed on a terminal of this width, escapes included."""
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=other, cwd=ROOT, env=environment)
    os.close(other)
    shown = b""
    while True:
        try:
            shown += os.read(main, 65536)
        except OSError:
            break
    os.close(main)
    assert process.wait() == 0
    return shown.decode()


def test_a_terminal_gets_one_live_line_and_lasting_evaluations(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom shardwright.train.metrics import MetricsLog\n"
        "with MetricsLog(Path(sys.argv[1]), total_steps=40, tensorboard=False) as log:\n"
        "    for step in range(1, 41):\n"
        "        log.advance(step, step / 40)\n"
        "        log.log(step, {'loss': 2.5, 'tokens_per_s': 1.0})\n"
        "    log.log(40, {'val_loss': 2.25})\n"
    )
    shown = _shown(code, tmp_path, 120)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "step 40/40  loss 2.5000" in text
    assert "100 %" in text
    assert text.count("validation loss 2.2500") == 1
    assert text.count("\n") < 10, "the line moves in place"


def test_lines_say_what_the_record_has() -> None:
    assert training_line({"step": 3}) == "step 3"
    assert training_line({"step": 3, "loss": None, "nonfinite": "loss", "lr": 1e-3}, 9) == (
        "step 3/9  loss not finite  lr 1.00e-03"
    )
    assert validation_line({"step": 3, "val_loss": 1.5}) == "step 3  validation loss 1.5000"


def test_mfu_is_the_models_flops_over_a_named_peak() -> None:
    peak = Peak(989e12, "H100-80GB-SXM dense bf16 peak, 989 TFLOP/s")
    use = Utilisation(flops_per_token=6 * 7e9, peak=peak, num_devices=8)
    assert use.mfu(80_000) == pytest.approx(6 * 7e9 * 80_000 / (8 * 989e12))
    assert use.describe() == ("MFU: 42.0 GFLOP a token over 8 x H100-80GB-SXM dense bf16 peak, 989 TFLOP/s")
    unknown = Utilisation(6e9, None)
    assert unknown.mfu(1e5) is None
    assert "not known" in unknown.describe()


def test_every_start_of_a_run_is_kept(tmp_path: Path) -> None:
    record_start(tmp_path / "run", 0, parameters=10, device="a CPU")
    record_start(tmp_path / "run", 100, parameters=10, device="another")
    starts = read_starts(tmp_path / "run")
    assert [(s["step"], s["device"]) for s in starts] == [(0, "a CPU"), (100, "another")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", s["utc"]) for s in starts)


def test_wandb_goes_on_offline_or_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"log.wandb=p: the wandb package is missing; pip install"):
            MetricsLog(tmp_path, tensorboard=False, wandb="p")
        return
    for first in (0, 2):
        with MetricsLog(tmp_path, first, tensorboard=False, wandb="p") as log:
            log.log(first + 1, fields(first + 1))
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "wandb_id").read_text()
    assert runs
    assert all(identity in run.name for run in runs), "one identity over all starts"
