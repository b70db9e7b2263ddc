"""`shardwright launch --sky`: a SkyPilot task as YAML, for AWS, Azure or Google Cloud; and how a node of it begins.

Beside kubernetes.py, over manifest.py. SkyPilot runs a script on each node and gives it its place by SKYPILOT_NODE_*
variables. The scripts here are constants: what the config says travels as JSON in a variable, which `python -m
shardwright.launcher.sky` on the node turns into torchrun's list of arguments, so that no shell ever reads it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.config import ConfigError
from shardwright.launcher.manifest import Wanted, refuse_secrets, to_yaml

CLOUDS = ("aws", "azure", "gcp")
GPUS = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_]*(:[1-9][0-9]*)?")
BUCKET = re.compile(r"(s3|gs|https)://[^\s'\"]+")
VOLUME = "volume:"
FOLDER = "/shardwright"  # where the storage lies; runs and data are relative to it
CONFIG = "~/shardwright-config"
COMMAND, PORT = "SHARDWRIGHT_COMMAND", 29500
SETUP = """\
set -e
python3 -m venv ~/shardwright-env
~/shardwright-env/bin/pip install --quiet --constraint constraints.txt .
"""
RUN = "exec ~/shardwright-env/bin/python -m shardwright.launcher.sky\n"
RUN_IN_IMAGE = "exec python -m shardwright.launcher.sky\n"


def write_task(
    wanted: Wanted, *, cloud: str | None, gpus: str | None, spot: bool, storage: str | None, image: str | None
) -> str:
    """The YAML of a run; ConfigError where an option is missing or wrong."""
    if cloud is not None and cloud not in CLOUDS:
        raise ConfigError(f"--cloud {cloud}: expected {', '.join(CLOUDS)}; without it SkyPilot takes the cheapest")
    if storage is None:
        raise ConfigError("--sky: needs --storage, a bucket such as s3://NAME/runs, or volume:NAME, for data and runs")
    if not storage.startswith(VOLUME) and not BUCKET.fullmatch(storage):
        raise ConfigError(f"--storage {storage}: expected s3://..., gs://..., https://... of Azure, or volume:NAME")
    refuse_secrets([storage])
    if wanted.nodes > 1 and not storage.startswith(VOLUME):
        raise ConfigError(
            f"--storage {storage}: what a node writes into a mounted bucket reaches the others late, and the "
            f"{wanted.nodes} nodes of a run share one folder; give a volume of SkyPilot as volume:NAME"
        )
    if image is None and not (Path("setup.py").is_file() and Path("constraints.txt").is_file()):
        raise ConfigError("--sky: start it in a checkout, which is installed on the nodes, or give --image NAME:TAG")
    how = "sky jobs launch FILE" if spot else "sky launch FILE"
    secrets = "".join(f" --secret {name}" for name in wanted.secrets)
    head = f"By shardwright launch --sky: {how}{secrets}"
    return to_yaml([build_task(wanted, cloud, gpus, spot, storage, image)], head)


def build_task(
    wanted: Wanted, cloud: str | None, gpus: str | None, spot: bool, storage: str, image: str | None
) -> dict[str, Any]:
    """The task as SkyPilot's schema has it."""
    resources: dict[str, Any] = {"use_spot": spot}
    resources |= {} if cloud is None else {"infra": cloud}
    resources |= {} if gpus is None else {"accelerators": gpus}
    resources |= {} if image is None else {"image_id": f"docker:{image}"}
    # A preempted node is replaced without being asked for; this is for what fails by itself.
    resources["job_recovery"] = {"max_restarts_on_errors": wanted.restarts}
    config = wanted.config if wanted.file is None else f"{CONFIG}/{wanted.file.name}"
    task: dict[str, Any] = {"name": wanted.name, "num_nodes": wanted.nodes, "resources": resources}
    task |= {"workdir": "."} if image is None else {}
    mounts: dict[str, Any] = {}
    if storage.startswith(VOLUME):
        task["volumes"] = {FOLDER: storage.removeprefix(VOLUME)}
    else:
        mounts[FOLDER] = {"source": storage, "mode": "MOUNT_CACHED"}
    if wanted.file is not None:
        mounts[config] = str(wanted.file)
    task |= {"file_mounts": mounts} if mounts else {}
    task["envs"] = {**(wanted.environment or {}), COMMAND: json.dumps(wanted.command(config))}
    task |= {"secrets": dict.fromkeys(wanted.secrets)} if wanted.secrets else {}
    return task | ({"setup": SETUP, "run": RUN} if image is None else {"run": RUN_IN_IMAGE})


def parse_gpus(text: str | None) -> int:
    """Processes of a node: the number in A100:8, one without; ConfigError where it is neither."""
    if text is None:
        return 1
    if not GPUS.fullmatch(text):
        raise ConfigError(f"--gpus {text}: expected NAME or NAME:NUMBER as SkyPilot has them, such as A100:8")
    return int(text.partition(":")[2] or 1)


# ------------------------------------------------------------------------------------------ on a node


def torchrun_command(environment: Mapping[str, str]) -> list[str]:
    """What a node runs, by SkyPilot's variables; ConfigError where one is missing."""
    needed = ("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", COMMAND)
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ConfigError(f"{missing[0]}: is not set; this runs on a node that SkyPilot started")
    hosts = environment["SKYPILOT_NODE_IPS"].split()
    words: list[str] = json.loads(environment[COMMAND])
    words = [os.path.expanduser(word) if word.startswith(f"{CONFIG}/") else word for word in words]
    options = {
        "nnodes": len(hosts),
        "node-rank": environment["SKYPILOT_NODE_RANK"],
        "nproc-per-node": max(int(environment.get("SKYPILOT_NUM_GPUS_PER_NODE") or 0), 1),
        "master-addr": hosts[0],
        "master-port": PORT,
    }
    start = [sys.executable, "-m", "torch.distributed.run"]
    return [*start, *(f"--{name}={value}" for name, value in options.items()), *words]


def main() -> None:
    """Become torchrun, in the folder that all nodes share."""
    try:
        command = torchrun_command(os.environ)
        os.chdir(FOLDER)
    except (ConfigError, OSError) as error:
        sys.exit(f"shardwright: {error}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
