"""Two and four real hosts in network namespaces: `launch --hosts` over a real sshd, torchrun, deepspeed's and mpirun's
hostfiles.

The ssh connection to one host dies while it trains: its ranks end themselves, and the run goes on with both. The other
launchers are started by the commands of the pages.
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
from tests.launcher.test_commands import command_of

__all__ = ["uninterrupted"]
STATIC, C10D = "torchrun --nnodes 2 --node-rank", "torchrun --nnodes 2 --nproc-per-node"
ONE_EACH = "--nproc-per-node 1"
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


def test_hosts_that_meet_over_ipv6(net, prepared, uninterrupted, tmp_path):
    """The store listens there, and on that address alone."""
    for number, name in enumerate(net.hosts, 1):
        netns.ip("-n", net.space(name), "addr", "replace", f"fd77::{number}/64", "dev", "eth0", "nodad")
    options = over_hosts(net, tmp_path, 1)
    lines = [f"{name} slots=1 address=[fd77::{number}]\n" for number, name in enumerate(net.hosts, 1)]
    (tmp_path / "hosts").write_text("".join(lines))
    raw = run_config(prepared, tmp_path / "run")
    with Launch(tmp_path, raw, *options, hold=[2], prefix=net.within(netns.LOGIN)) as launch:
        launch.wait_held(2)
        assert "[fd77::1]" in listening(net, "h0") and not {"*", "0.0.0.0", "[::]"} & listening(net, "h0")
        launch.release(2)
        assert launch.finish() == 0, launch.text
        check(launch, uninterrupted)


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


def config_file(folder: Path, raw: dict[str, Any]) -> dict[str, str]:
    """A config in the place of a page's own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return {"configs/english.yaml": str(path)}


def check_losses(run: Path, uninterrupted: Path) -> None:
    """AssertionError unless every step is there with the loss of the uninterrupted run."""
    found = {r["step"]: r["loss"] for r in read_metrics(run) if "loss" in r}
    expected = {r["step"]: r["loss"] for r in read_metrics(uninterrupted) if "loss" in r}
    assert list(found) == list(range(1, STEPS + 1))
    assert max(relative(found[step], expected[step]) for step in found) < LOSS


def test_torchrun_finds_the_interface(net, prepared, uninterrupted, tmp_path):
    """No GLOO_SOCKET_IFNAME is given, and each host's own name is 127.0.1.1, as on Debian."""
    one_each = config_file(tmp_path, run_config(prepared, tmp_path / "run")) | {"--nproc-per-node 4": ONE_EACH}
    commands = [command_of("torchrun", STATIC, one_each | meet_static(net, number)) for number in range(len(net.hosts))]
    agents_of(net, net.hosts, commands)
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


def meet_static(net: netns.Network, number: int) -> dict[str, str]:
    """What the page's command for torchrun's static rendezvous is on one host."""
    return {"--node-rank 0": f"--node-rank {number}", "10.0.0.1": net.address("h0")}


def meet_c10d(net: netns.Network, number: int) -> dict[str, str]:
    """The same for c10d: torchrun cannot tell by itself on which host it is, where names are loopback's."""
    own = net.address(net.hosts[number])
    return {"is_host=1": f"is_host={1 - min(number, 1)}", "--local-addr 10.0.0.1": f"--local-addr {own}",
            "10.0.0.1": net.address("h0"), "29500": "29502"}  # fmt: skip


@pytest.mark.parametrize(("start", "meet"), [(STATIC, meet_static), (C10D, meet_c10d)], ids=["static", "c10d"])
def test_four_hosts_by_torchrun(start, meet, four, prepared, uninterrupted, tmp_path):
    """With c10d the agents agree on the ranks, and the store is on the host that is told so."""
    changes = config_file(tmp_path, run_config(prepared, tmp_path / "run"))
    changes |= {"--nnodes 2": "--nnodes 4", "--nproc-per-node 4": ONE_EACH}
    commands = [command_of("torchrun", start, changes | meet(four, number)) for number in range(len(four.hosts))]
    assert any("4 processes, data 4" in text for text in agents_of(four, four.hosts, commands))
    check_losses(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("way", ["pdsh", "no_ssh"])
def test_deepspeed_with_a_hostfile(way, net, prepared, uninterrupted, tmp_path):
    """By pdsh over the real sshd, or started on each host by hand with its number."""
    if way == "pdsh" and shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed (Debian: apt-get install pdsh)")
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'shardwright[deepspeed]'")
    raw = run_config(prepared, tmp_path / "run") | {"parallel": {"zero": 1}}
    changes = config_file(tmp_path, raw) | {"hosts": str(netns.hosts_file(tmp_path / "hosts", net.hosts, 1))}
    more = {"DS_ACCELERATOR": "cpu", "PATH": net.path_with_ssh()}
    if way == "pdsh":
        texts = agents_of(net, [netns.LOGIN], [command_of("deepspeed", "deepspeed --hostfile hosts --module", changes)],
                          **more)  # fmt: skip
    else:
        changes |= {"node1": net.address("h0")}
        start = "deepspeed --hostfile hosts --no_ssh"
        numbers = [{"--node_rank 0": f"--node_rank {number}"} for number in range(2)]
        texts = agents_of(net, net.hosts, [command_of("deepspeed", start, changes | own) for own in numbers], **more)
    assert any("2 processes, data 2" in text for text in texts), texts
    check_losses(tmp_path / "run", uninterrupted)


def test_mpirun_with_a_hostfile(net, prepared, uninterrupted, tmp_path):
    """Over the real sshd; of this environment the hosts get what the page's command names."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: apt-get install openmpi-bin)")
    changes = config_file(tmp_path, run_config(prepared, tmp_path / "run"))
    changes |= {"hosts": str(netns.hosts_file(tmp_path / "hosts", net.hosts, 1)), "-n 8": "-n 2"}
    changes |= {"10.0.0.1": net.address("h0"), "shardwright train": f"{sys.executable} -m shardwright train"}
    root = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    command = command_of("torchrun", "mpirun -n 8 --hostfile", changes)
    (text,) = agents_of(net, [netns.LOGIN], [command], PATH=net.path_with_ssh(), OMP_NUM_THREADS="1", **root)
    assert "2 processes, data 2" in text, text
    check_losses(tmp_path / "run", uninterrupted)
