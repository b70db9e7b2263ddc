"""Several real hosts on one machine: network namespaces joined by a bridge, each with its own name and its own sshd.

Nothing of the machine's own network is touched: the bridge lies in a namespace too, and so does `login`, from which
commands are started. A host can be cut off (its cable is pulled) or killed (every process, and then the cable). Needs
root, `ip` (Debian: iproute2) and `sshd` (openssh-server); `why_not` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

SSHD = "/usr/sbin/sshd"
LOGIN = "login"


def why_not() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    for tool, package in (
        ("ip", "iproute2"),
        ("ssh", "openssh-client"),
        (SSHD, "openssh-server"),
        ("unshare", "util-linux"),
    ):
        if shutil.which(tool) is None:
            return f"needs {Path(tool).name} (Debian: apt-get install {package})"
    probe = f"sw{uuid.uuid4().hex[:6]}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return None if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


def why_not_slow() -> str | None:
    """Why there can be no slow link here; None where there can."""
    if (reason := why_not()) is not None:
        return reason
    if not has_netem() and not Path("/dev/net/tun").exists():
        return "the kernel has neither sch_netem (modprobe sch_netem) nor /dev/net/tun"
    return None


@cache
def has_netem() -> bool:
    """Whether tc (of iproute2) can delay and lose packets here; many containers' kernels cannot."""
    if why_not() is not None or shutil.which("tc") is None:
        return False
    probe = f"sw{uuid.uuid4().hex[:6]}"
    ip("netns", "add", probe)
    command = ["tc", "-n", probe, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    done = subprocess.run(command, capture_output=True)
    ip("netns", "del", probe)
    return done.returncode == 0


class Network:
    """Hosts `h0`, `h1`, ... with addresses 10.77.0.1, 10.77.0.2, ..., and `login`."""

    def __init__(self, folder: Path, count: int, *, sshd: bool = True) -> None:
        self.folder, self.tag = folder, f"sw{uuid.uuid4().hex[:5]}"
        self.hosts = [f"h{n}" for n in range(count)]
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._cables: list[subprocess.Popen[bytes]] = []
        self._namespaces = [self.space(name) for name in ("switch", LOGIN, *self.hosts)]
        for space in self._namespaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        ip("-n", self.space("switch"), "link", "add", "bridge", "type", "bridge")
        ip("-n", self.space("switch"), "link", "set", "bridge", "up")
        for name in (LOGIN, *self.hosts):
            self._plug_in(name)
        self._write_names()
        if sshd:
            self._make_keys()
            for name in self.hosts:
                self.start_sshd(name)

    def space(self, name: str) -> str:
        """The namespace of a host."""
        return f"{self.tag}-{name}"

    def address(self, name: str) -> str:
        """Of a host, on the bridge."""
        return f"10.77.0.{250 if name == LOGIN else 1 + self.hosts.index(name)}"

    def _plug_in(self, name: str) -> None:
        space, switch = self.space(name), self.space("switch")
        ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", switch)
        ip("-n", switch, "link", "set", name, "master", "bridge", "up")
        ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")

    def _write_names(self) -> None:
        """`ip netns exec` puts these files over /etc: each host has its own name at 127.0.1.1, as Debian does it."""
        for name in (LOGIN, *self.hosts):
            place = Path("/etc/netns") / self.space(name)
            place.mkdir(parents=True)
            others = [f"{self.address(other)} {other}" for other in self.hosts if other != name]
            (place / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]) + "\n")

    def _make_keys(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)], check=True)
        self.ssh_config = self.folder / "ssh_config"
        self.ssh_config.write_text(
            f"Host *\n User root\n IdentityFile {self.folder / 'user'}\n IdentitiesOnly yes\n"
            f" StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )

    def path_with_ssh(self) -> str:
        """A PATH on which `ssh` reaches the hosts, for programs that take the ssh that they find."""
        program = self.folder / "bin" / "ssh"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.ssh_config} "$@"\n')
        program.chmod(0o755)
        return f"{program.parent}:{os.environ['PATH']}"

    def start_sshd(self, name: str) -> None:
        """A real sshd on port 22 of a host, ready when this returns."""
        options = {
            "ListenAddress": self.address(name), "HostKey": self.folder / "host", "PidFile": "none", "UsePAM": "no",
            "AuthorizedKeysFile": self.folder / "user.pub", "StrictModes": "no", "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
        }  # fmt: skip
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        start = 'hostname "$1" && shift && exec "$@"'
        command = ["unshare", "--uts", "sh", "-c", start, "sh", name, SSHD, "-D", "-e", "-f", "/dev/null", *words]
        log = (self.folder / f"sshd-{name}.log").open("ab")
        server = subprocess.Popen(self.within(name, *command), stdout=log, stderr=log, start_new_session=True)
        log.close()
        self._servers[name] = server
        deadline = time.monotonic() + 60
        while "Server listening" not in (self.folder / f"sshd-{name}.log").read_text():
            assert server.poll() is None and time.monotonic() < deadline, "sshd does not start"
            time.sleep(0.05)

    def server(self, name: str) -> int:
        """The process of a host's sshd."""
        return self._servers[name].pid

    def within(self, name: str, *command: str) -> list[str]:
        """A command inside of a host."""
        return ["ip", "netns", "exec", self.space(name), *command]

    def named(self, name: str, *command: str) -> list[str]:
        """The same under the host's own name."""
        start = 'hostname "$1" && shift && exec "$@"'
        return self.within(name, "unshare", "--uts", "sh", "-c", start, "sh", name, *command)

    def cut(self, name: str) -> None:
        """Pull the cable: no packet comes or goes, and no process is told."""
        ip("-n", self.space("switch"), "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        ip("-n", self.space("switch"), "link", "set", name, "up")

    def part(self, apart: bool = True) -> None:
        """Cut all hosts off from each other, though `login` still reaches each of them; or join them again."""
        for name in self.hosts:
            ip(
                "-n",
                self.space("switch"),
                "link",
                "set",
                name,
                "type",
                "bridge_slave",
                "isolated",
                "on" * apart or "off",
            )

    def slow(self, name: str, delay_ms: float, loss_percent: float) -> None:
        """From now on packets to and from a host are late, and some are lost: by netem, else by cable.py."""
        if has_netem():
            late = ["root", "netem", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%"]
            for space, device in ((self.space("switch"), name), (self.space(name), "eth0")):
                subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", device, *late], check=True)
            return
        switch, near, far, own = self.space("switch"), f"{name}-near", f"{name}-far", f"{name}-bridge"
        words = [sys.executable, str(Path(__file__).with_name("cable.py")), near, far]
        command = ["ip", "netns", "exec", switch, *words, str(delay_ms), str(loss_percent), name]
        self._cables.append(cable := subprocess.Popen(command, stdout=subprocess.PIPE))
        assert cable.stdout is not None and cable.stdout.readline() == b"ready\n"
        ip("-n", switch, "link", "add", own, "type", "bridge")
        for device, master in ((near, own), (far, "bridge"), (name, own)):
            ip("-n", switch, "link", "set", device, "master", master, "up")
        ip("-n", switch, "link", "set", own, "up")

    def pids(self, name: str) -> list[int]:
        """Processes of a host."""
        found = subprocess.run(["ip", "netns", "pids", self.space(name)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, name: str) -> None:
        """The power fails: the cable first, so that no other host is told, then every process."""
        self.cut(name)
        for pid in self.pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if name in self._servers:
            self._servers.pop(name).wait()

    def boot(self, name: str) -> None:
        """The power is back."""
        self.mend(name)
        self.start_sshd(name)

    def close(self) -> None:
        """Leave nothing."""
        for name in (*self.hosts, LOGIN):
            for pid in self.pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for server in self._servers.values():
            server.wait()
        for cable in self._cables:
            cable.kill()
            cable.wait()
        for space in self._namespaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


def ip(*words: str) -> None:
    """Run ip; AssertionError with its words where it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@contextmanager
def network(folder: Path, count: int, *, sshd: bool = True) -> Iterator[Network]:
    """Hosts for the length of a block."""
    folder.mkdir(parents=True, exist_ok=True)
    built = Network(folder, count, sshd=sshd)
    try:
        yield built
    finally:
        built.close()


def hosts_file(path: Path, hosts: Sequence[str], slots: int) -> Path:
    """A file for --hosts."""
    path.write_text("".join(f"{name} slots={slots}\n" for name in hosts))
    return path
