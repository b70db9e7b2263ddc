"""--debug: one process whatever the layout, the same batch, a folder of its own, and pdb where it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardwright.config import ConfigError
from shardwright.train import debug as room
from shardwright.train.metrics import read_metrics
from shardwright.train.run import train
from shardwright.train.settings import read_config
from tests.equivalence.cells import config, relative

ROOT = Path(__file__).resolve().parents[2]


def test_a_debug_run_is_the_run_in_one_process(prepared, tmp_path):
    """Same batch, same losses, whatever the layout; nothing of the run itself is touched."""
    raw = config(prepared, tmp_path / "run")
    oracle = train(read_config(raw, [f"run={tmp_path / 'oracle'}", "train.steps=20"]))
    result = room.debug(read_config(raw, ["parallel.tensor=2", "parallel.data=2", "train.steps=5000",
                                          "schedule.name=constant", "schedule.warmup_steps=5"]))  # fmt: skip
    assert result.step == room.STEPS and Path(result.run) == tmp_path / "run-debug" / "1"
    assert not (tmp_path / "run").exists()
    mine, expected = (read_metrics(Path(r.run))[0] for r in (result, oracle))
    assert relative(mine["loss"], expected["loss"]) < 1e-6


@pytest.mark.in_turn
@pytest.mark.parametrize(
    "settings",
    [
        ["engine=deepspeed", "parallel.zero=3", "deepspeed.offload_parameters=cpu", "parallel.offload=true"],
        ["engine=accelerate", "parallel.zero=3", "parallel.offload=true"],
    ],
    ids=["deepspeed", "accelerate"],
)
def test_a_run_of_another_engine_is_debugged_natively(settings, prepared, tmp_path, caplog):
    raw = config(prepared, tmp_path / "run")
    found = room.debug_config(read_config(raw, [*settings, "parallel.data=4"]))
    assert (found.engine, found.deepspeed.offload_parameters, found.parallel.zero) == ("native", "none", 1)
    room.debug(read_config(raw, [*settings, "parallel.data=4"]))
    assert "the layout was data=4 on 4 processes" in caplog.text


def test_small_shapes_and_a_folder_for_each(prepared, tmp_path):
    raw = config(prepared, tmp_path / "run")
    (tmp_path / "run-debug" / "1").mkdir(parents=True)
    found = room.debug_config(read_config(raw, ["batch.ramp={start: 2, increment: 2, sequences: 40}"]), small=True)
    assert (found.model.layers, found.data.sequence_length, found.global_batch()) == (2, 64, 4)
    assert found.run == str(tmp_path / "run-debug" / "2")
    assert found.parallel.tensor == 1 and found.train.deterministic and found.train.compile is False


def test_several_processes_are_refused(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--debug: is one process, and a launcher started 2"):
        room.debug(read_config(config(prepared, tmp_path / "run"), []))


def test_a_gradient_that_is_no_number_is_found_where_it_arises(prepared, tmp_path, monkeypatch):
    """Anomaly detection is on, and pdb opens at the error."""
    opened = []
    monkeypatch.setattr("pdb.Pdb.interaction", lambda *arguments: opened.append(arguments[-1]))
    monkeypatch.setattr(torch.Tensor, "backward", spoiled(torch.Tensor.backward))
    with pytest.raises(RuntimeError, match="returned nan values"):
        room.debug(read_config(config(prepared, tmp_path / "run"), []))
    assert opened and not torch.is_anomaly_enabled()


def spoiled(backward):
    """Backward of a loss whose root is taken at 0, times 0."""

    def call(loss, *arguments, **options):
        return backward(loss + (loss.detach() - loss).sqrt() * 0, *arguments, **options)

    return call


@pytest.mark.slow
def test_pdb_opens_for_a_user(prepared, tmp_path):
    """From the command line, with pdb's commands from standard input."""
    code = (
        "import sys; from shardwright.train import run; run.Run._after_step = lambda self: 1 / 0;"
        "from shardwright.launcher.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "train", "debug/gpt2", f"data.path={prepared}", f"run={tmp_path / 'run'}"]
    done = subprocess.run([*command, "--debug"], input="where\nq\n", capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)  # fmt: skip
    assert done.returncode != 0
    assert "ZeroDivisionError: division by zero; pdb stands where it was raised" in done.stderr
    assert "-> code" not in done.stdout and "(Pdb)" in done.stderr
