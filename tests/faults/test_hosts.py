"""Two and four real hosts in network namespaces: `launch --hosts` over a real sshd, torchrun, deepspeed's hostfile.

The ssh connection to one host dies while it trains: its ranks end themselves, and the run goes on with both. torchrun
and deepspeed are started as their users start them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launcher.attempt import Job
from shardwright.launcher.hosts import SSH, Host
from shardwright.launcher.supervise import Supervisor
from shardwright.train.metrics import read_metrics
from tests import netns
from tests.equivalence.cells import LOSS, relative
from tests.faults.launched import ROOT, Launch, over_hosts
from tests.faults.test_lost_rank import wait_for
from tests.faults.test_restart import STEPS, check, run_config, uninterrupted

__all__ = ["uninterrupted"]
REASON = netns.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Two hosts."""
    with netns.network(tmp_path_factory.mktemp("net"), 2) as built:
        yield built


def listening(net: netns.Network, host: str) -> set[str]:
    """Addresses on which processes of a host listen, sshd's own left out."""
    table = subprocess.run(net.within(host, "ss", "-Htnl"), capture_output=True, text=True, check=True).stdout
    found = {line.split()[3] for line in table.splitlines()}
    return {place.rpartition(":")[0] for place in found if not place.endswith(":22")}


def test_over_ssh_and_the_connection_dies(net, prepared, uninterrupted, tmp_path):
    raw = run_config(prepared, tmp_path / "run")
    with Launch(tmp_path, raw, *over_hosts(net, tmp_path, 1), hold=[6], prefix=net.within(netns.LOGIN)) as launch:
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


def test_a_spare_that_is_lost_is_said_at_once(net, tmp_path, capfd):
    """And not counted on; the run, which sleeps for a while on one host, does not notice."""
    hosts = [Host(name, slots=1) for name in net.hosts]
    job = Job(
        command=["timeit", "-n", "1", "-r", "1", "import time; time.sleep(7)"],
        hosts=hosts,
        fits=lambda size: None if size == 1 else "one process",
        checkpoints=tmp_path,
        progress=tmp_path / "none",
        min_hosts=1,
        lease_s=4.0,
        rejoin_s=None,
        ssh=net.within(netns.LOGIN, "ssh", "-F", str(net.ssh_config), *SSH[1:]),
    )
    codes: list[int] = []
    run = threading.Thread(target=lambda: codes.append(Supervisor(job).run()))
    run.start()
    said = wait_for(lambda: capfd.readouterr().err, 60)
    assert "starting with 1 of 2 hosts, 1 process; spare: h1" in said
    net.cut("h1")
    run.join(120)
    net.mend("h1")
    assert codes == [0]
    assert "shardwright: lost the spare h1: no word from it for 4 s\n" in capfd.readouterr().err


def ssh_client(net: netns.Network, host: str) -> int:
    """The ssh client that holds the connection to a host."""
    for pid in net.pids(netns.LOGIN):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[0] == b"ssh" and host.encode() in words:
            return pid
    raise AssertionError(f"no ssh to {host}")


def agents_of(net: netns.Network, hosts: Sequence[str], commands: Sequence[Sequence[str]], **more: str) -> list[str]:
    """What one command on each host prints; AssertionError where one fails."""
    started = [
        subprocess.Popen(
            net.named(host, *command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **more},
        )
        for host, command in zip(hosts, commands, strict=True)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(hosts), texts
    return texts


def train_command(folder: Path, raw: dict[str, Any]) -> list[str]:
    """The end of a launcher's command line."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return ["shardwright", "train", str(path)]


def check_losses(run: Path, uninterrupted: Path) -> None:
    """AssertionError unless every step is there with the loss of the uninterrupted run."""
    found = {r["step"]: r["loss"] for r in read_metrics(run) if "loss" in r}
    expected = {r["step"]: r["loss"] for r in read_metrics(uninterrupted) if "loss" in r}
    assert list(found) == list(range(1, STEPS + 1))
    assert max(relative(found[step], expected[step]) for step in found) < LOSS


def test_torchrun_finds_the_interface(net, prepared, uninterrupted, tmp_path):
    """No GLOO_SOCKET_IFNAME is given, and each host's own name is 127.0.1.1, as on Debian."""
    train = train_command(tmp_path, run_config(prepared, tmp_path / "run"))
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meet = ["--master-addr", net.address("h0"), "--master-port", "29500", "-m", *train]
    agents_of(net, net.hosts, [[*start, "--node-rank", str(rank), *meet] for rank in range(2)])
    check_losses(tmp_path / "run", uninterrupted)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four hosts."""
    with netns.network(tmp_path_factory.mktemp("four"), 4) as built:
        yield built


def test_four_hosts_by_launch(four, prepared, uninterrupted, tmp_path):
    raw = run_config(prepared, tmp_path / "run") | {"parallel": {"tensor": 2}}
    with Launch(tmp_path, raw, *over_hosts(four, tmp_path, 1), prefix=four.within(netns.LOGIN)) as launch:
        assert launch.finish() == 0, launch.text
        assert launch.lines[0] == "starting with 4 of 4 hosts, 4 processes"
        check(launch, uninterrupted)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_four_hosts_by_torchrun(rendezvous, four, prepared, uninterrupted, tmp_path):
    """With c10d the agents agree on the ranks, and the store is on the host that is told so."""
    train = train_command(tmp_path, run_config(prepared, tmp_path / "run"))
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "4", "--nproc-per-node", "1"]
    store = four.address("h0")
    commands = [[*start, *MEET[rendezvous](store, number, four.address(host)), "-m", *train]
                for number, host in enumerate(four.hosts)]  # fmt: skip
    assert any("4 processes, data 4" in text for text in agents_of(four, four.hosts, commands))
    check_losses(tmp_path / "run", uninterrupted)


def meet_static(store: str, number: int, own: str) -> list[str]:
    """Arguments of torchrun's static rendezvous for one host."""
    return ["--node-rank", str(number), "--master-addr", store, "--master-port", "29501"]


def meet_c10d(store: str, number: int, own: str) -> list[str]:
    """The same for c10d: torchrun cannot tell by itself on which host it is, where names are loopback's."""
    conf = f"is_host={1 - min(number, 1)}"
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{store}:29502", "--rdzv-id", "four", "--rdzv-conf", conf,
            "--local-addr", own]  # fmt: skip


MEET = {"static": meet_static, "c10d": meet_c10d}


@pytest.mark.parametrize("way", ["pdsh", "no_ssh"])
def test_deepspeed_with_a_hostfile(way, net, prepared, uninterrupted, tmp_path):
    """By pdsh over the real sshd, or started on each host by hand with its number."""
    if way == "pdsh" and shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed (Debian: apt-get install pdsh)")
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'shardwright[deepspeed]'")
    hosts = netns.hosts_file(tmp_path / "hosts", net.hosts, 1)
    raw = run_config(prepared, tmp_path / "run") | {"engine": "deepspeed", "parallel": {"zero": 1}}
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--master_addr",
             net.address("h0"), "--master_port", "29503"]  # fmt: skip
    train = ["--module", *train_command(tmp_path, raw)]
    ssh = tmp_path / "bin" / "ssh"  # deepspeed and pdsh take the ssh that they find, with options of their own
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {net.ssh_config} "$@"\n')
    ssh.chmod(0o755)
    more = {"DS_ACCELERATOR": "cpu", "PATH": f"{ssh.parent}:{os.environ['PATH']}"}
    if way == "pdsh":
        texts = agents_of(net, [netns.LOGIN], [[*start, *train]], **more)
    else:
        commands = [[*start, "--no_ssh", "--node_rank", str(rank), *train] for rank in range(2)]
        texts = agents_of(net, net.hosts, commands, **more)
    assert any("2 processes, data 2" in text for text in texts), texts
    check_losses(tmp_path / "run", uninterrupted)
