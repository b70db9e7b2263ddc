"""launch --sky: SkyPilot itself parses what is written, and a node begins as its variables say.

SkyPilot's dependencies do not fit those of this environment: name the Python of another one that has it in
SKYPILOT_PYTHON, as .ci/run does. Nothing is started in any cloud.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.config import ConfigError
from shardwright.launcher.manifest import build_wanted
from shardwright.launcher.sky import COMMAND, parse_gpus, torchrun_command, write_task

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/debug/gpt2.yaml")
PLACE: Any = {"cloud": "aws", "gpus": "A100:8", "spot": True, "storage": "s3://bucket/runs", "image": None}
PARSE = """
import json, sys, sky
tasks = [sky.Task.from_yaml(path) for path in sys.argv[1:]]
print(json.dumps([{
    "name": t.name, "nodes": t.num_nodes, "envs": t.envs, "run": t.run, "resources": [str(r) for r in t.resources],
    "spot": [r.use_spot for r in t.resources], "recovery": [r.job_recovery for r in t.resources],
    "storage": {k: [v.source, v.mode.value] for k, v in t.storage_mounts.items()}, "volumes": t.volumes,
} for t in tasks]))
"""


def skypilot() -> str | None:
    """A Python that has SkyPilot."""
    return os.environ.get("SKYPILOT_PYTHON") or (sys.executable if importlib.util.find_spec("sky") else None)


def task(nodes: int = 1, overrides: Any = ("batch.micro=1",), **options: Any) -> str:
    wanted = build_wanted(CONFIG, list(overrides), nodes=nodes, processes=parse_gpus(options.get("gpus", "A100:8")))
    return write_task(wanted, **{**PLACE, **options})


@pytest.mark.skipif(skypilot() is None, reason="needs SkyPilot in an environment of its own: set SKYPILOT_PYTHON")
def test_skypilot_parses_it(tmp_path: Path) -> None:
    texts = {
        "aws": task(),
        "azure": task(cloud="azure", storage="https://account.blob.core.windows.net/container", spot=False),
        "gcp": task(2, cloud="gcp", gpus="H100:8", storage="volume:shared", image="registry.example/shardwright:cuda"),
        "any": task(cloud=None, gpus=None, storage="gs://bucket"),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    environment = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [str(skypilot()), "-c", PARSE, *(str(tmp_path / f"{name}.yaml") for name in texts)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = dict(zip(texts, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for name, cloud in (("aws", "AWS"), ("azure", "Azure"), ("gcp", "GCP")):
        assert found[name]["resources"][0].startswith(cloud), found[name]
    assert "A100': 8" in found["aws"]["resources"][0] and found["aws"]["spot"] == [True]
    assert found["aws"]["storage"] == {"/shardwright": ["s3://bucket/runs", "MOUNT_CACHED"]}
    assert found["gcp"]["nodes"] == 2 and found["gcp"]["volumes"] == {"/shardwright": "shared"}
    assert all(entry["recovery"][0]["max_restarts_on_errors"] == 3 for entry in found.values())


def test_the_scripts_are_constants() -> None:
    """Whatever the config says, no shell reads it."""
    plain, nasty = (yaml.safe_load(task(overrides=["batch.micro=1", run])) for run in ("run=x", "run=$(id);`id`'\"&"))
    assert (plain["setup"], plain["run"]) == (nasty["setup"], nasty["run"])
    assert json.loads(nasty["envs"][COMMAND])[-1] == "run=$(id);`id`'\"&"


def test_a_node_takes_its_place_from_skypilots_variables() -> None:
    given = yaml.safe_load(task(2, storage="volume:shared"))["envs"]
    given |= {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9\n", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    command = torchrun_command(given)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    expected = ["--nnodes=2", "--node-rank=1", "--nproc-per-node=8", "--master-addr=10.0.0.4", "--master-port=29500"]
    assert command[3:8] == expected
    home = os.path.expanduser("~")
    assert command[8:] == ["-m", "shardwright", "train", f"{home}/shardwright-config/gpt2.yaml", "batch.micro=1"]
    assert "--nproc-per-node=1" in torchrun_command(given | {"SKYPILOT_NUM_GPUS_PER_NODE": "0"})
    with pytest.raises(ConfigError, match="SKYPILOT_NODE_RANK: is not set; this runs on a node"):
        torchrun_command({k: v for k, v in given.items() if k != "SKYPILOT_NODE_RANK"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"storage": None}, "--sky: needs --storage"),
        ({"storage": "bucket"}, "--storage bucket: expected s3://"),
        ({"storage": "s3://key:hunter2@bucket"}, "a URL here holds a password"),
        ({"nodes": 2}, "--storage s3://bucket/runs: what a node writes into a mounted bucket reaches the others late"),
        ({"cloud": "ec2"}, "--cloud ec2: expected aws, azure, gcp"),
        ({"gpus": "A100:none"}, "--gpus A100:none: expected NAME or NAME:NUMBER"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task(**options)


def test_away_from_a_checkout_an_image_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="start it in a checkout, which is installed on the nodes, or give --image"):
        task()
    assert "setup" not in yaml.safe_load(task(image="registry.example/shardwright:cuda"))
