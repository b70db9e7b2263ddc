"""Which interface and address of this host other hosts are reached by: what the kernel would route through.

Nothing is guessed and nothing falls back to loopback: gloo takes the interface that the host's own name resolves to,
which on many machines is 127.0.1.1, and then waits for peers that cannot come.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import NamedTuple

import psutil

from shardwright.config import ConfigError
from shardwright.launcher.world import Place

LOOPBACK = "127.0.0.1"


class Route(NamedTuple):
    """The way from this host to another."""

    interface: str
    address: str  # of this host, on that interface


def find_route(peer: str) -> Route:
    """How this host reaches `peer` (a name or an address); ValueError in one line where it does not."""
    family, target = _resolve(peer)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting sends nothing: the kernel only looks up a way
        try:
            probe.connect((target, 9))
        except OSError as error:
            raise ValueError(f"no way to {peer} ({target}): {error.strerror or error}") from None
        own = str(probe.getsockname()[0])
    interface = _interface(own)
    if interface is None:
        raise ValueError(f"{own}, by which {peer} is reached, is on no interface of this host")
    return Route(interface, own)


def find_way_out(peer: str) -> Route:
    """`find_route` to another host; ValueError where it would stay on this one."""
    route = find_route(peer)
    if _is_loopback(route):
        raise ValueError(
            f"{peer} is this host itself ({route.interface} {route.address}); give a name or address of it that other "
            "hosts reach, in the hosts file or as address=..."
        )
    return route


def choose_interface(place: Place | None, environment: MutableMapping[str, str] | None = None) -> None:
    """Have gloo and NCCL use the interface by which the first host is reached; loopback where all ranks are on one.

    A user's own GLOO_SOCKET_IFNAME stands. ConfigError where no interface but loopback comes into question: each host
    would wait for the others on its own.
    """
    environment = os.environ if environment is None else environment
    if place is None or place.master is None or environment.get("GLOO_SOCKET_IFNAME"):
        return
    if place.size > 1 and place.local_size == place.size:  # nothing of it needs to listen where other machines reach it
        inside = loopback().interface
        environment["GLOO_SOCKET_IFNAME"] = inside
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={inside}")
        return
    if place.hosts == 1:
        return
    try:
        route = find_route(place.master)
    except ValueError as error:
        raise ConfigError(f"MASTER_ADDR={place.master}: {error}") from None
    outside = [route.interface]
    if _is_loopback(route):  # the first host itself, whose name is 127.0.1.1 in its own /etc/hosts
        outside = [name for name in _interfaces() if not name.startswith(("docker", "br-", "virbr"))]
    if len(outside) != 1:
        found = ", ".join(outside) or "none"
        raise ConfigError(
            f"MASTER_ADDR={place.master}: is this host itself, and which interface the others reach it by is not clear "
            f"({found}); set MASTER_ADDR to an address, or GLOO_SOCKET_IFNAME to an interface"
        )
    environment["GLOO_SOCKET_IFNAME"] = outside[0]


def _interfaces() -> list[str]:
    """Interfaces that are up and have an IPv4 address that is not loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return [
        name
        for name, entries in psutil.net_if_addrs().items()
        if name in up and any(e.family == socket.AF_INET and not e.address.startswith("127.") for e in entries)
    ]


def interface_address(name: str) -> str | None:
    """The address of an interface, IPv4 first as gloo takes it; None where it has none."""
    entries = psutil.net_if_addrs().get(name, ())
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in entries:
            if entry.family == family:
                return str(entry.address)
    return None


def loopback() -> Route:
    """The way to this host itself."""
    return find_route(LOOPBACK)


def bind(address: str) -> socket.socket:
    """A socket that listens on a free port of one address, for the store at which all ranks meet."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((address, 0))
    server.listen(2048)
    return server


def _is_loopback(route: Route) -> bool:
    return route.address.startswith("127.") or route.address == "::1"


def _resolve(name: str) -> tuple[int, str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise ValueError(f"{name} has no address here: {error.strerror or error}") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # gloo's interfaces are looked up by IPv4 first
    return found[0][0], str(found[0][4][0])


def _interface(address: str) -> str | None:
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None
