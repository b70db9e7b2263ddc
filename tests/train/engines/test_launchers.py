"""The engines as their own launchers start them: two processes by `deepspeed` and by `accelerate launch`."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.equivalence.cells import config
from tests.equivalence.work import run
from tests.ranks import VARIABLES, free_port

LAUNCHERS = {
    "deepspeed": ("deepspeed.launcher.runner", ["--num_gpus", "2", "--master_port", "{port}", "--module"]),
    "accelerate": (
        "accelerate.commands.launch",
        ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
         "--dynamo_backend", "no", "--main_process_port", "{port}", "-m"],
    ),
}  # fmt: skip


@pytest.mark.in_turn
@pytest.mark.parametrize("engine", LAUNCHERS)
def test_its_own_launcher_starts_it(engine, prepared, tmp_path):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed: pip install 'shardwright[{engine}]'")
    raw = config(prepared, tmp_path / "run") | {"engine": engine}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    module, options = LAUNCHERS[engine]
    port = str(free_port())
    command = [sys.executable, "-m", module, *(option.format(port=port) for option in options)]
    asked = ["shardwright", "train", str(file), "train.steps=6", "parallel.zero=3"]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    found = subprocess.run(
        [*command, *asked], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 processes, data 2" in found.stdout + found.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+/6  loss (\S+)", found.stdout + found.stderr)]
    expected = [r["loss"] for r in run(config(prepared, tmp_path / "alone"), ["train.steps=6"]) if "loss" in r]
    assert losses == pytest.approx(expected, abs=1e-4)
