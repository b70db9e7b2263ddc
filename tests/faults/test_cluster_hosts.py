"""doctor --cluster on two real hosts in network namespaces, under torchrun as its users start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import netns
from tests.faults.launched import ROOT

REASON = netns.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.faults]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Two hosts."""
    with netns.network(tmp_path_factory.mktemp("net"), 2, sshd=False) as built:
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
