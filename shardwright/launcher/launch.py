"""`shardwright launch`: check a config and the options before anything starts, then run it on this machine or on hosts.

Under cli.py, above supervise.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardwright.config import Config, ConfigError, parse_duration
from shardwright.launcher.attempt import Job
from shardwright.launcher.hosts import SSH, Host, read_hosts
from shardwright.launcher.supervise import Supervisor
from shardwright.launcher.world import FAMILIES, in_step
from shardwright.parallel.mesh import mesh_shape
from shardwright.parallel.proposals import check_layout
from shardwright.train.folder import CHECKPOINTS
from shardwright.train.layout import build_facts
from shardwright.train.metrics import METRICS
from shardwright.train.settings import read_config

MODULE = "shardwright"
#: Variables that are given to other hosts without being asked for: how libraries behave, no paths and no secrets.
PASSED_ON = re.compile(
    r"(NCCL|GLOO|TORCH|OMP|MKL|KMP)_[A-Z_0-9]+|CUDA_(VISIBLE_DEVICES|LAUNCH_BLOCKING)|PYTHONHASHSEED"
)


@dataclass(frozen=True)
class Options:
    """What the command line says beside the config; durations as text."""

    processes: int | None = None  # of each host; None: its GPUs, else one
    hosts: Path | None = None
    min_hosts: int | None = None
    restarts: int = 3
    grace: str = "60s"
    lost_after: str = "30s"
    rejoin: str = "5m"
    wait: str = "10m"
    pass_on: Sequence[str] = ()
    python: str = sys.executable
    ssh: str | None = None
    doctor: bool = False  # only look whether the run could start


def launch(config: str, overrides: Sequence[str], options: Options) -> int:
    """Run `train CONFIG overrides...` as `options` say; its exit code. ConfigError before anything was started."""
    return Supervisor(build_job(config, overrides, options)).run()


def build_job(config: str, overrides: Sequence[str], options: Options) -> Job:
    """What the supervisor is to do."""
    _refuse_nesting()
    resolved = read_config(config, overrides)
    hosts = build_hosts(options)
    if options.ssh is None and options.hosts is not None and shutil.which("ssh") is None:
        raise ConfigError("ssh: is not installed (Debian: apt-get install openssh-client)")
    rejoin = None if options.rejoin == "never" else _seconds("--rejoin", options.rejoin)
    return Job(
        command=[MODULE, *(("doctor", "--cluster") if options.doctor else ("train",)), config, *overrides],
        hosts=hosts,
        fits=lambda size: why_not(resolved, size),
        checkpoints=Path(resolved.run or "") / CHECKPOINTS,
        progress=Path(resolved.run or "") / METRICS,
        min_hosts=_least(options, len(hosts)),
        restarts=0 if options.doctor else options.restarts,
        once=options.doctor,
        grace_s=_seconds("--grace", options.grace),
        lease_s=_seconds("--lost-after", options.lost_after),
        rejoin_s=rejoin,
        wait_s=_seconds("--wait", options.wait),
        python=options.python,
        ssh=SSH if options.ssh is None else [*shlex.split(options.ssh), *SSH[1:]],
        environment=passed_on(options.pass_on),
    )


def build_hosts(options: Options) -> list[Host]:
    """The hosts of the file, or this machine."""
    if options.hosts is None:
        return [Host("this machine", slots=options.processes, local=True)]
    hosts = read_hosts(options.hosts)
    if options.processes is None:
        return hosts
    other = next((host for host in hosts if host.slots not in (None, options.processes)), None)
    if other is not None:
        said = f"{options.hosts} says slots={other.slots} of {other.name}"
        raise ConfigError(f"--nproc {options.processes}: {said}; give one of both")
    return [replace(host, slots=options.processes) for host in hosts]


def why_not(config: Config, size: int) -> str | None:
    """Why a config cannot run as so many processes; None where it can."""
    try:
        mesh_shape(config.parallel, size)
        check_layout(build_facts(config, size))
    except ConfigError as error:
        return str(error)
    return None


def passed_on(names: Sequence[str]) -> dict[str, str]:
    """Variables of this environment that other hosts get, over ssh's own channel and in no command line."""
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: is not set here")
    return {name: value for name, value in os.environ.items() if name in names or PASSED_ON.fullmatch(name)}


def _least(options: Options, hosts: int) -> int:
    least = hosts if options.min_hosts is None else options.min_hosts
    if not 1 <= least <= hosts:
        raise ConfigError(f"--min-nodes {least}: there {'is one host' if hosts == 1 else f'are {hosts} hosts'}")
    return least


def _seconds(option: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}") from None


def _refuse_nesting() -> None:
    """ConfigError inside of another launcher's process: each would start a whole run."""
    alone = os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    steps = [] if alone or not in_step(os.environ) else ["SLURM_PROCID"]  # of a batch script: not by itself
    for name in ("TORCHELASTIC_RUN_ID", "RANK", *(names.rank for names in FAMILIES), *steps):
        if name in os.environ:
            raise ConfigError(
                f"{name}={os.environ[name]}: launch was itself started by a launcher; start it once, without one, or "
                "have the launcher start shardwright train"
            )
