"""doctor --cluster on two real hosts in network namespaces: under torchrun as its users start it, and by launch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from tests import netns
from tests.equivalence.cells import config
from tests.faults.launched import ROOT
from tests.launcher.test_commands import command_of

REASON = netns.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.faults]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Two hosts."""
    with netns.network(tmp_path_factory.mktemp("net"), 2) as built:
        yield built


def test_two_sound_hosts(net: netns.Network, prepared: Path, tmp_path: Path) -> None:
    """No interface is given, and each host's own name is 127.0.1.1, as on Debian."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meet = ["--master-addr", net.address("h0"), "--master-port", "29500", "-m", "shardwright"]
    command = ["doctor", "--cluster", "debug/gpt2", f"data.path={prepared}", f"run={tmp_path / 'run'}", "--json"]
    agents = [
        subprocess.Popen(
            net.named(host, *start, "--node-rank", str(rank), *meet, *command),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, host in enumerate(net.hosts)
    ]  # fmt: skip
    try:
        texts = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], texts
    assert texts[1][0] == "", "rank 0 alone speaks"
    lines = {check["name"]: check["detail"] for check in json.loads(texts[0][0].splitlines()[-1])["checks"]}
    assert lines["ranks"] == "2 processes on 2 hosts, started by torchrun"
    assert lines["interface"] == f"eth0 {net.address('h0')} on rank 0"
    assert lines["run folder"] == f"{tmp_path / 'run'} is one on all hosts"
    assert lines["all-reduce"].startswith("gloo: 1 MB in ")


def launch_doctor(net: netns.Network, prepared: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The page's command, from beside the hosts; the run's folder is `run` below `folder`."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(prepared, folder / "run")))
    changes = {"hosts": str(netns.hosts_file(folder / "hosts", net.hosts, 1)), "configs/english.yaml": str(path)}
    program, *words = command_of("launch", "shardwright launch --doctor --hosts", changes)
    at = words.index("--hosts")
    command = net.within(netns.LOGIN, program, *words[:at], *more, *words[at:])
    environment = os.environ | {"PATH": net.path_with_ssh(), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


def test_launch_doctor_over_ssh(net: netns.Network, prepared: Path, tmp_path: Path) -> None:
    done = launch_doctor(net, prepared, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert lines["ranks"] == "ok      ranks       2 processes on 2 hosts, started by torchrun"
    assert lines["ports"] == "ok      ports       each rank reaches the one 1 further"
    assert {line.split()[0] for line in lines.values()} == {"ok"}
    assert done.stderr.splitlines()[0] == "shardwright: starting with 2 of 2 hosts, 2 processes"
    assert not (tmp_path / "run").exists()


@contextmanager
def another_file(net: netns.Network, host: str, place: Path, text: str, folder: Path) -> Iterator[None]:
    """Within, a file has another text on one host: on what sshd starts there, which has mounts of its own."""
    (folder / "another").write_text(text)
    enter = ["nsenter", "--mount", "--target", str(net.server(host))]
    subprocess.run([*enter, "mount", "--bind", str(folder / "another"), str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "umount", str(place)], check=True)


def test_another_torch_on_one_host(net: netns.Network, prepared: Path, tmp_path: Path) -> None:
    """The file in which torch's own version stands: no byte code of it is to stay behind."""
    place = Path(torch.__file__).with_name("version.py")
    text = re.sub(r"__version__ = .*", "__version__ = '2.12.9'", place.read_text())
    with another_file(net, "h1", place, text, tmp_path):
        done = launch_doctor(net, prepared, tmp_path, "--env", "PYTHONDONTWRITEBYTECODE")
    assert done.returncode == 1, done.stdout + done.stderr
    (failed,) = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert failed.startswith(f"failed  versions    rank 1 on h1: torch is 2.12.9, on rank 0 {torch.__version__}; inst")
