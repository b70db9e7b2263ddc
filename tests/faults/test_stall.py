"""A run that stands still: every rank leaves with exit code 1, and one page says who held the others up.

Real ranks over gloo. A capsule of a step that raised on one of several ranks is replayed in one process.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from shardwright.train.capsule import Capsule
from shardwright.train.replay import replay
from shardwright.train.run import train
from shardwright.train.settings import read_config
from tests.equivalence.cells import config
from tests.faults import fork_ranks
from tests.faults.test_lost_rank import MARK, marked, wait_for
from tests.ranks import free_port
from tests.train.test_replay import plant

pytestmark = [
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for processes left behind"),
    pytest.mark.faults,
]
ROOT = Path(__file__).resolve().parents[2]
START_S, LIMIT_S = 240.0, 120.0
SIZE = 2
PY_SPY = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


@contextmanager
def running(prepared, folder: Path, spoil: str = "none:-1:0", size: int = SIZE, **settings):
    """SIZE ranks of a run that goes on for ever; (process, mark, output). None is left."""
    raw = config(prepared, folder / "run") | settings
    raw["train"] |= {"steps": 100_000}
    raw["batch"] = {"sequences": 4 * size, "micro": 2}
    raw["watch"] = {"every": "0.5s", "timeout": "6s"}
    path, output, mark = folder / "config.yaml", folder / "output", f"stall-{os.getpid()}-{folder.name}"
    path.write_text(yaml.safe_dump(raw))
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "SPOIL": spoil, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, fork_ranks.__file__, str(size), str(free_port()), str(path)]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process, mark, output
    finally:
        process.kill()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def stalled(output: Path) -> str:
    """The one line that says who held the others up, once a rank has said it."""
    lines = [line for line in output.read_text().splitlines() if line.startswith("shardwright: ")]
    return "\n".join(lines)


def page_of(folder: Path) -> str:
    """The text of the one page there is; its HTML twin is beside it."""
    (text,) = (folder / "run" / "watch").glob("stall_*.txt")
    assert text.with_suffix(".html").is_file()
    return text.read_text()


def test_a_loader_that_hangs(prepared, tmp_path):
    with running(prepared, tmp_path, "hang:1:4") as (process, mark, output):
        assert process.wait(START_S) == 0, output.read_text()
        wait_for(lambda: not marked(mark), 10)
    said = stalled(output)
    assert re.match(
        r"shardwright: stalled: rank 1 on \S+ \(pid \d+\) is in data loading of step 5 since \d+ s, "
        r"at sequences 32 to 39; the other 1 waits in all_reduce; all stacks in \S+\.html$",
        said,
    ), output.read_text()
    assert set(re.findall(r"rank \d ended with \d", output.read_text())) == {
        f"rank {r} ended with 1" for r in range(SIZE)
    }
    page = page_of(tmp_path)
    assert page.startswith("rank 1 on ") and page.index("==== rank 1\n") < page.index("==== rank 0\n")
    assert "fork_ranks.py" in page and "all_reduce: work.wait()" in page


@pytest.mark.parametrize(
    ("engine", "zero", "wait"),
    [
        ("native", 0, r"waits in all_reduce"),
        ("native", 3, r"waits in \w+"),
        ("deepspeed", 1, r"waits in \w+"),
        ("deepspeed", 3, r"waits in \w+"),
        ("accelerate", 0, r"is in the backward pass of step 5 at micro-batch 2"),
        ("accelerate", 3, r"waits in \w+"),
    ],
)
def test_a_layer_that_hangs_under_each_engine(engine, zero, wait, prepared, tmp_path):
    """In the last micro-batch, where the other rank is at the same place but for the direction."""
    if engine != "native":
        pytest.importorskip(engine, reason=f"not installed: pip install 'shardwright[{engine}]'")
    settings = {"engine": engine, "parallel": {"zero": zero}}
    with running(prepared, tmp_path, "stick:1:4", **settings) as (process, mark, output):
        assert process.wait(START_S) == 0, output.read_text()
        wait_for(lambda: not marked(mark), 10)
    begins = (
        r"shardwright: stalled: rank 1 on \S+ \(pid \d+\) is in step 5 at micro-batch 2 since \d+ s, "
        rf"at sequences 32 to 39; the other 1 {wait}; all stacks in \S+\.html$"
    )
    assert re.match(begins, stalled(output)), output.read_text()
    assert "fork_ranks.py" in page_of(tmp_path).partition("==== rank 0\n")[0]


def test_a_rank_that_is_stopped(prepared, tmp_path):
    with running(prepared, tmp_path) as (process, _, output):
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, START_S)
        stopped = json.loads((tmp_path / "run" / "watch" / "000" / "rank_00001.json").read_text())["pid"]
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: "rank 0 ended with 1" in output.read_text(), LIMIT_S)
        assert process.poll() is None
        os.kill(stopped, signal.SIGCONT)  # it finds that it was given up
        assert process.wait(LIMIT_S) == 0
    said = stalled(output)
    begins = rf"shardwright: stalled: rank 1 on \S+ \(pid {stopped}\) is silent since \d+ s, last seen "
    assert re.match(begins, said), output.read_text()
    assert "; the other 1 waits in " in said and said.count("\n") == 0
    assert "rank 1 ended with 1" in output.read_text()
    page = page_of(tmp_path)
    seen = page.partition("==== rank 1\n")[2].partition("====")[0]
    assert "seen by py-spy:\n" in seen or "no stacks: py-spy" in seen
    if PY_SPY:
        assert "_one_step (" in seen or "ptrace" in seen


def test_an_exception_of_one_rank_is_kept_and_replayed(prepared, tmp_path, monkeypatch):
    with running(prepared, tmp_path, "raise:1:3") as (process, _, output):
        assert process.wait(START_S) == 0, output.read_text()
    folder = tmp_path / "run" / "capsules" / "step_00000004"
    capsule = Capsule.read(folder)
    assert (capsule.kind, capsule.error, capsule.module, capsule.rank) == (
        "exception", "ArithmeticError", "blocks.0.mlp", 1
    )  # fmt: skip
    assert "shardwright replay" in output.read_text()
    assert "not reproduced: step 4 went well on one device" in replay(folder).text
    for owner, name in ((fork_ranks.LossModel, "begin"), (fork_ranks.MLP, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that they are given back
    fork_ranks.spoil_layer(3)
    again = replay(folder)
    assert again.reproduced and type(again.error) is ArithmeticError and again.module == "blocks.0.mlp"
    assert again.text.startswith("reproduced: step 4: ArithmeticError: a kernel gave up, in blocks.0.mlp; batch bit-eq")


STOPPED = {
    "tensor": {"parallel": {"tensor": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "zero_bubble": {"parallel": {"pipeline": 2, "schedule": "zbv"}},
    "context": {"parallel": {"context": 2}},
    "deepspeed": {"engine": "deepspeed", "parallel": {"zero": 3}},
    "accelerate": {"engine": "accelerate", "parallel": {"zero": 0}},
}


@pytest.mark.parametrize("layout", STOPPED)
def test_a_stop_of_several_ranks_is_replayed_by_one(layout, prepared, tmp_path):
    """A NaN in a weight of the checkpoint that two ranks go on from, neither of which may have it whole."""
    if "engine" in STOPPED[layout]:
        pytest.importorskip(layout, reason=f"not installed: pip install 'shardwright[{layout}]'")
    raw = config(prepared, tmp_path / "run")
    raw["train"] |= {"steps": 4}
    raw |= {"checkpoint": {"every": 2, "keep_last": 9}, "guard": {"nonfinite": "stop"}, "schedule": {"warmup_steps": 1}}
    train(read_config(raw))
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    plant(tmp_path / "run", "blocks.1.mlp.down.weight")
    raw |= STOPPED[layout]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, fork_ranks.__file__, "2", str(free_port()), str(tmp_path / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=START_S)
    assert "rank 0 ended with 1" in done.stdout and "rank 1 ended with 1" in done.stdout, done.stderr
    folder = tmp_path / "run" / "capsules" / "step_00000003"
    both = (folder / "rank_00001.safetensors").exists()
    assert both is ("engine" in STOPPED[layout]), "ranks of one data index read the same, which is kept once"
    assert Capsule.read(folder).weights["path"] == "../../checkpoints/step_00000002"
    answer = replay(folder)
    assert answer.reproduced and answer.module == "blocks.1.mlp.down (forward), micro-batch 0", answer.text
