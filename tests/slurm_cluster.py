"""A real SLURM on one machine: munged, slurmctld and a slurmd on each host of tests/netns.py, all in one folder.

Commands are run on `login`. Nothing of the machine's own SLURM or munge is read or changed. Needs root and Debian's
slurm-wlm and munge; `why_not` says what is missing.

ProctrackType is pgid: of what real clusters use (cgroup) it has the one property that matters here, that a signal for a
job does not reach the srun in its script. linuxproc would send it there, and srun kills its tasks at once.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests import netns
from tests.faults.launched import ROOT

T = TypeVar("T")
TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
# A requeued job may begin when the credentials of its last start are void: cred_expire, and 5 s is the least.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
CONF = """\
ClusterName=test
SlurmctldHost={login}({login_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=0
GresTypes=gpu
KillWait=30
NodeName={nodes} CPUs=16 Gres=gpu:8 State=UNKNOWN
PartitionName=gpu Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None where there can."""
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return f"needs {tool} (Debian: apt-get install {package})"
    return netns.why_not()


class Cluster:
    """Nodes `h0`, `h1`, ... and their daemons."""

    def __init__(self, folder: Path, net: netns.Network) -> None:
        self.folder, self.net = folder, net
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        values = {"folder": folder, "login": netns.LOGIN, "login_address": net.address(netns.LOGIN)}
        nodes = f"h[0-{len(net.hosts) - 1}]"
        (folder / "slurm.conf").write_text(CONF.format(**values, nodes=nodes))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")  # nothing of it is used
        (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-7]\n")  # any files do, where none is used
        (folder / "state").mkdir()

    def start(self) -> None:
        """All daemons; returns when every node is idle."""
        folder = self.folder
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        place = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={folder}/munge.{name}" for option, name in place.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", *words])
        wait_for((folder / "munge.socket").exists)
        self._daemon("slurmctld", self.net.named(netns.LOGIN, "slurmctld", "-D"))
        for node in self.net.hosts:
            self._daemon(node, self.net.named(node, "slurmd", "-D", "-N", node))
        wait_for(lambda: self.states() == {"idle"})

    def stop(self) -> None:
        """Kill all daemons, and the ranks with the hosts: nothing that they could leave in order is kept."""
        for daemon in self._daemons:
            daemon.kill()
        for daemon in self._daemons:
            daemon.wait()

    def _daemon(self, name: str, command: list[str]) -> None:
        environment = {**self.environment, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}
        with (self.folder / f"{name}.out").open("wb") as log:
            self._daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def run(
        self, *command: str, check: bool = True, folder: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """A command on `login`, in a folder; AssertionError where it fails, unless that is what is looked for."""
        done = subprocess.run(
            self.net.named(netns.LOGIN, *command), cwd=folder, env={**self.environment, **variables},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}{self.log()}"
        return done

    def states(self) -> set[str]:
        """Of the nodes, as sinfo names them."""
        return set(self.run("sinfo", "-h", "-o", "%T", check=False).stdout.split())

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number).stdout))

    def wait_ended(self, number: str, tell: Callable[[], str] = str) -> dict[str, str]:
        """What is known of a job after its end."""
        wait_for(lambda: self.job(number)["JobState"] in ENDED, tell=tell)
        return self.job(number)

    def log(self) -> str:
        """Last words of the daemons."""
        return "".join(
            "\n" + path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("slurm*.log"))
        )


def wait_for(condition: Callable[[], T], seconds: float = 120.0, tell: Callable[[], str] = str) -> T:
    """What `condition()` gives once it is true; AssertionError with `tell()` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, tell()
        time.sleep(0.1)
    return answer


@contextmanager
def cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster for the length of a block."""
    with netns.network(folder, nodes, sshd=False) as net:
        built = Cluster(folder, net)
        try:
            built.start()
            yield built
        except AssertionError:
            print(built.log(), file=sys.stderr)
            raise
        finally:
            built.stop()
