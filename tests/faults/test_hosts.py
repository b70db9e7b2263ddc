"""Two real hosts in network namespaces: `launch --hosts` over a real sshd, and torchrun as its users start it.

The ssh connection to one host dies while it trains: its ranks end themselves, and the run goes on with both.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shardwright.train.metrics import read_metrics
from tests import netns
from tests.equivalence.cells import LOSS, relative
from tests.faults.launched import ROOT, Launch
from tests.faults.test_restart import check, run_config, uninterrupted

__all__ = ["uninterrupted"]
REASON = netns.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Two hosts."""
    with netns.network(tmp_path_factory.mktemp("net"), 2) as built:
        yield built


def options(net: netns.Network, folder: Path, slots: int, *more: str) -> list[str]:
    """What `launch` is told of these hosts."""
    hosts = netns.hosts_file(folder / "hosts", net.hosts, slots)
    return ["--hosts", str(hosts), "--ssh", f"ssh -F {net.ssh_config}", *more]


def listening(net: netns.Network, host: str) -> set[str]:
    """Addresses on which processes of a host listen, sshd's own left out."""
    table = subprocess.run(net.within(host, "ss", "-Htnl"), capture_output=True, text=True, check=True).stdout
    found = {line.split()[3] for line in table.splitlines()}
    return {place.rpartition(":")[0] for place in found if not place.endswith(":22")}


def test_over_ssh_and_the_connection_dies(net, prepared, uninterrupted, tmp_path):
    raw = run_config(prepared, tmp_path / "run")
    with Launch(tmp_path, raw, *options(net, tmp_path, 1), hold=[6], prefix=net.within(netns.LOGIN)) as launch:
        launch.wait_held(6)
        assert launch.lines[0] == "starting with 2 of 2 hosts, 2 processes"
        assert [listening(net, host) for host in net.hosts] == [{net.address(host)} for host in net.hosts]
        ranks = launch.pids("train", RANK="1")
        os.kill(ssh_client(net, "h1"), signal.SIGKILL)
        launch.wait_line("lost host h1: ")
        launch.release(6)
        assert launch.wait_line("attempt 2").startswith("attempt 2 (restart 1 of 3) with 2 of 2 hosts, 2 processes")
        assert not set(ranks) & set(net.pids("h1"))
        assert launch.finish() == 0, launch.text
        check(launch, uninterrupted)
    assert all(re.search("sshd", Path(f"/proc/{pid}/comm").read_text()) for h in net.hosts for pid in net.pids(h))


def ssh_client(net: netns.Network, host: str) -> int:
    """The ssh client that holds the connection to a host."""
    for pid in net.pids(netns.LOGIN):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[0] == b"ssh" and host.encode() in words:
            return pid
    raise AssertionError(f"no ssh to {host}")


def test_torchrun_finds_the_interface(net, prepared, uninterrupted, tmp_path):
    """No GLOO_SOCKET_IFNAME is given, and each host's own name is 127.0.1.1, as on Debian."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(prepared, tmp_path / "run")))
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meet = ["--master-addr", net.address("h0"), "--master-port", "29500"]
    agents = [
        subprocess.Popen(
            net.named(host, *start, "--node-rank", str(rank), *meet, "-m", "shardwright", "train", str(path)),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, host in enumerate(net.hosts)
    ]  # fmt: skip
    try:
        texts = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], texts
    found = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r}
    for record in read_metrics(uninterrupted):
        assert "loss" not in record or relative(found[record["step"]], record["loss"]) < LOSS
