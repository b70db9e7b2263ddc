"""`launch` before anything starts: hosts files, options, contradictions; and what runs on hosts is built of lists."""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from shardwright.config import ConfigError, RunError
from shardwright.launcher.attempt import Attempt
from shardwright.launcher.hosts import Host, Link, keeper_command, read_hosts
from shardwright.launcher.launch import Options, build_hosts, build_job, launch, passed_on
from shardwright.launcher.network import bind, choose_interface, find_route, find_way_out
from shardwright.launcher.supervise import Supervisor, _Stopped
from shardwright.launcher.words import first_code, how
from shardwright.launcher.world import Place

CONFIG = "debug/gpt2"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hosts_file(tmp_path):
    path = written(tmp_path, "# mine\nnode1 slots=8\nme@node2 port=2222 address=10.0.0.2  # second\n\nnode3\n")
    first, second, third = read_hosts(path)
    assert (first.name, first.slots, first.meets_at) == ("node1", 8, "node1")
    assert (second.name, second.port, second.meets_at, second.slots) == ("me@node2", 2222, "10.0.0.2", None)
    assert third == Host("node3")


def test_brackets_of_an_ipv6_address_are_taken_off(tmp_path):
    """ssh would look for a host of that name."""
    first, second = read_hosts(written(tmp_path, "me@[fd00::1] slots=8\nnode2 address=[fd00::2]\n"))
    assert (first.name, first.meets_at, second.meets_at) == ("me@fd00::1", "fd00::1", "fd00::2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("node1\nnode1 slots=2", "line 2: node1 stands twice"),
        ("node1 slot=2", "'slot=2': expected slots=N"),
        ("node1 slots=two", "'slots=two': expected a whole number"),
        ("node1 slots=0", "expected a whole number from 1"),
        ("-oProxyCommand=id", "is no host name"),
        ("node1\nlocalhost", "localhost is this machine only"),
        ("node1\n127.0.0.1 slots=1", "127.0.0.1 is this machine only"),
        ("node1\n[::1] slots=1", "::1 is this machine only"),
        ("[fd00::1]:22", r"'\[fd00::1\]:22' is no host name; expected such as fd00::1 slots=8 port=2222"),
        ("node1\nnode2 address=fe80::2%eth0", "fe80::2%eth0 is known on one link of one host only; give another"),
        ("fd00::1\n[fd00::1]", "line 2: fd00::1 stands twice"),
    ],
)
def test_a_hosts_file_that_is_wrong(text, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        read_hosts(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hosts(tmp_path / "none")


def test_the_word_a_remote_shell_reads_is_quoted():
    command = keeper_command(Host("node1", port=22), "/a folder/$(id)", "/py thon", ["ssh", "-T"])
    assert command[:5] == ["ssh", "-T", "-p", "22", "node1"]
    assert shlex.split(command[5]) == [
        "cd", "--", "/a folder/$(id)", "&&", "exec", "/py thon", "-m", "shardwright.launcher.host"
    ]  # fmt: skip


def test_options_that_do_not_fit(tmp_path):
    hosts = written(tmp_path, "node1 slots=2\nnode2 slots=2")
    with pytest.raises(ConfigError, match="--min-nodes 3: there are 2 hosts"):
        build_job(CONFIG, [], Options(hosts=hosts, min_hosts=3))
    with pytest.raises(ConfigError, match="--grace soon"):
        build_job(CONFIG, [], Options(grace="soon"))
    with pytest.raises(ConfigError, match="--nproc 4: .* says slots=2 of node1"):
        build_hosts(Options(hosts=hosts, processes=4))
    with pytest.raises(ConfigError, match="--env NO_SUCH_NAME: is not set here"):
        passed_on(["NO_SUCH_NAME"])
    with pytest.raises(ConfigError, match="train.stepz"):
        build_job(CONFIG, ["train.stepz=1"], Options())


def test_secrets_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    found = passed_on([])
    assert found["NCCL_DEBUG"] == "INFO" and "WANDB_API_KEY" not in found
    assert passed_on(["WANDB_API_KEY"])["WANDB_API_KEY"] == "secret"


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"MV2_COMM_WORLD_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_launch_inside_a_launcher_is_refused(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="launch was itself started by a launcher"):
        build_job(CONFIG, [], Options())
    if "SLURM_PROCID" in variables:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
        build_job(CONFIG, [], Options())


def test_ranks_that_end_by_the_signal_for_a_returning_host_are_no_loss():
    """It came as the run was just ending, when nothing waits for signals any more."""
    job = build_job(CONFIG, [], Options(restarts=0))
    supervisor, attempt = Supervisor(job), Attempt([Link(host, SimpleQueue(), []) for host in job.hosts])
    rank = {"rank": 0, "local_rank": 0, "pid": 7, "code": -signal.SIGTERM}
    ended = {"code": 1, "ours": False, "stopped": False, "clean": True, "first": 0, "failures": {"0": rank}}
    attempt.ended = {attempt.links[0]: ended}
    assert supervisor._conclude(attempt) == 1
    attempt.asked = "the return of a host"
    assert supervisor._conclude(attempt) is None


@pytest.mark.parametrize(("code", "ends"), [(2, 2), (1, None), (-signal.SIGKILL, None)])
def test_a_refusal_is_not_started_again(code, ends):
    supervisor = Supervisor(build_job(CONFIG, [], Options()))
    attempt = Attempt([Link(host, SimpleQueue(), []) for host in supervisor.job.hosts])
    rank = {"rank": 0, "local_rank": 0, "pid": 7, "code": code}
    attempt.ended[attempt.links[0]] = {"code": 1, "ours": False, "stopped": 0, "first": 0, "failures": {"0": rank}}
    assert supervisor._conclude(attempt) == ends
    assert supervisor.restarts == (ends is None)


def test_a_signal_before_ranks_are_started_ends_the_launch():
    job = build_job(CONFIG, [], Options())
    supervisor = Supervisor(job)
    supervisor.attempt = Attempt([Link(host, SimpleQueue(), []) for host in job.hosts])
    with pytest.raises(_Stopped):
        supervisor._on_signal(signal.SIGINT)


def test_which_worlds_a_layout_fits():
    job = build_job(CONFIG, ["parallel.tensor=2"], Options(processes=4))
    assert job.fits(4) is None and job.fits(2) is None
    assert "does not make the world of 3" in str(job.fits(3))
    fixed = build_job(CONFIG, ["parallel.data=2"], Options(processes=2))
    assert fixed.fits(2) is None and "parallel: data=2" in str(fixed.fits(1))


def test_the_way_to_another_host_is_never_loopback():
    assert find_route("127.0.0.1").address == "127.0.0.1"
    with pytest.raises(ValueError, match="is this host itself"):
        find_way_out("127.0.0.1")
    with pytest.raises(ValueError, match="no-such-host.invalid has no address"):
        find_route("no-such-host.invalid")
    with bind("127.0.0.1") as server:
        assert server.getsockname()[0] == "127.0.0.1"
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def test_gloo_is_told_an_interface():
    one, two = Place("torchrun", 0, 2, 0, 2, "127.0.0.1", 1), Place("torchrun", 0, 4, 0, 2, "no-such.invalid", 1)
    found: dict[str, str] = {}
    choose_interface(None, found)
    choose_interface(one._replace(local_size=None), found)
    assert found == {}, "nothing is known"
    choose_interface(one, inside := {})
    lo = inside["GLOO_SOCKET_IFNAME"]
    assert inside == {"GLOO_SOCKET_IFNAME": lo, "NCCL_SOCKET_IFNAME": f"={lo}"} and lo in ("lo", "lo0")
    with pytest.raises(ConfigError, match="MASTER_ADDR=no-such.invalid"):
        choose_interface(two, found)
    choose_interface(two, chosen := {"GLOO_SOCKET_IFNAME": "eth7"})
    assert chosen == {"GLOO_SOCKET_IFNAME": "eth7"}


def test_how_a_process_ended():
    assert how(-signal.SIGKILL) == "killed by SIGKILL" and how(3) == "exit code 3"
    assert first_code({"code": 1, "first": 2, "failures": {"2": {"code": -9}}}) == -9
    assert first_code({"code": -9}) == -9


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed (Debian: apt-get install openssh-client)")
def test_a_host_that_cannot_be_reached_is_named_with_what_ssh_says(tmp_path):
    hosts = written(tmp_path, "no-such-host.invalid slots=1")
    with pytest.raises(RunError, match=r"0 of 1 hosts answer, 1 are needed \(no-such-host.invalid: ssh: .*resolve"):
        launch(CONFIG, [], Options(hosts=hosts))


def test_what_a_login_shell_prints_is_passed_over(tmp_path):
    """Before the keeper's first line, as many clusters greet their users; it is the reason where nothing follows."""
    inbox: SimpleQueue[Any] = SimpleQueue()
    for answer, problem in (('{"hello": {"devices": 2}}', ""), ("no such file", "no such file")):
        link = Link(Host("node1"), inbox, ["sh", "-c", f"echo Welcome to node1; echo 12; echo '{answer}'"])
        link.open({})
        while inbox.get()[1] is not None:
            pass
        link.wait(10)
        assert (link.hello is None, link.problem) == (bool(problem), problem)
