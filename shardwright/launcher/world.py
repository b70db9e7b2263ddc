"""Who started this process, and as which rank of how many: one answer from the variables of every launcher.

The only place that knows launchers: `enter_world` reads what torchrun, deepspeed, accelerate, srun or mpirun left in
the environment and writes torch's own variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), which is all that other rooms read. Where two launchers disagree, or many processes would each train
alone, it stops with the reason: a fallback to a world of one would cost a cluster and show nothing.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple
from zlib import crc32

from shardwright.config import ConfigError

FIRST_PORT, PORTS = 20000, 10000  # of meeting points that are derived from a job's number


class Place(NamedTuple):
    """One process as a launcher sees it; `launcher` is the name that users know it by."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None = None  # None where the launcher does not say
    master: str | None = None  # host of rank 0
    port: int | None = None

    @property
    def hosts(self) -> int:
        """Least number of hosts that the ranks are on."""
        return 1 if self.local_size is None else -(-self.size // self.local_size)

    def __str__(self) -> str:
        return f"{self.launcher} says rank {self.rank} of {self.size}"


class Names(NamedTuple):
    """Variables of a launcher that gives each process its place."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: str = ""  # what tells two jobs of one host apart, the same on all ranks


FAMILIES = (
    Names("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
          "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE"),
    Names("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
          "MV2_COMM_WORLD_LOCAL_SIZE"),
    Names("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip


def enter_world(environment: MutableMapping[str, str] | None = None) -> Place | None:
    """Write torch's variables into `environment` (this process's own); the place, or None for a single process.

    ConfigError where the variables contradict each other or lack something, with the remedy.
    """
    environment = os.environ if environment is None else environment
    place = find_place(environment)
    if place is None:
        return None
    if place.size > 1 and place.master is None:
        raise ConfigError(
            f"{place}, but not where rank 0 is: set MASTER_ADDR to the host of rank 0, for example "
            "mpirun -x MASTER_ADDR=$(hostname)"
        )
    if not 0 <= place.rank < place.size:
        raise ConfigError(f"{place}: expected 0 to {place.size - 1}; unset what another launcher left")
    check_master(place)
    port = FIRST_PORT if place.port is None else place.port
    found = {"RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_RANK": place.local_rank}
    found |= {} if place.local_size is None else {"LOCAL_WORLD_SIZE": place.local_size}
    found |= {} if place.size == 1 else {"MASTER_ADDR": place.master, "MASTER_PORT": port}  # type: ignore[dict-item]
    environment.update({name: str(value) for name, value in found.items()})
    return place


def find_place(environment: Mapping[str, str]) -> Place | None:
    """What all variables together say; None where this is no process of a launcher."""
    own, mpi, slurm = _by_torch(environment), _by_mpi(environment), _by_slurm(environment)
    if mpi is not None and slurm is not None and _carries_mpi(mpi, slurm):
        slurm = None
    others = [place for place in (mpi, slurm) if place is not None]
    if own is not None and own.launcher in ("torchrun", "deepspeed"):
        _refuse_islands(own, others, environment)
        place: Place | None = own
    else:
        places = others if own is None else [own, *others]
        place = _agreed(places, environment) if places else None
    if place is None or place.size == 1:
        _refuse_to_be_alone(place, environment)
    return place


def check_master(place: Place) -> None:
    """ConfigError where ranks of other hosts would look for rank 0 on their own."""
    if place.hosts == 1 or place.master is None:
        return
    name = place.master
    if is_loopback(name) or (place.rank >= (place.local_size or place.size) and is_loopback(_address(name))):
        raise ConfigError(
            f"MASTER_ADDR={name}: is this host itself, but {place} and the ranks are on {place.hosts} hosts; set it "
            "to a name or address of the first host that the others reach (hostname -I prints its addresses)"
        )


def is_loopback(host: str | None) -> bool:
    """Whether a name or address means the machine that asks."""
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("localhost.")


def first_host(nodes: str) -> str:
    """The first name of a SLURM list: `gpu[03-07,12],login` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None, nodes
    return "".join(part or "" for part in match.groups())


def _by_torch(environment: Mapping[str, str]) -> Place | None:
    """Of torch's own variables."""
    given = [name for name in ("RANK", "WORLD_SIZE") if environment.get(name)]
    if not given:
        return None
    several = _number(environment, "WORLD_SIZE", 1) > 1 or "RANK" in given
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK") if several else ("WORLD_SIZE",)
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"{given[0]}={environment[given[0]]}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "set; start several processes with torchrun, or unset what another program left"
        )
    local = _number(environment, "LOCAL_WORLD_SIZE", _number(environment, "LOCAL_SIZE", 0)) or None
    size, rank = _number(environment, "WORLD_SIZE", 1), _number(environment, "RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank}: is no rank of WORLD_SIZE={size}; expected 0 to {size - 1}")
    port = _number(environment, "MASTER_PORT", 0) or None
    kind = _kind(environment)
    return Place(kind, rank, size, _number(environment, "LOCAL_RANK", 0), local, environment.get("MASTER_ADDR"), port)


def _kind(environment: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"  # accelerate launch uses it too
    return "deepspeed" if "CROSS_SIZE" in environment else "RANK and WORLD_SIZE"


def _by_mpi(environment: Mapping[str, str]) -> Place | None:
    for names in FAMILIES:
        if names.rank in environment and names.size in environment:
            size = _number(environment, names.size, 1)
            local = _number(environment, names.local_size, 0) or None
            master = environment.get("MASTER_ADDR") or ("127.0.0.1" if local == size else None)
            job = environment.get(names.job, "")
            port = _number(environment, "MASTER_PORT", 0) or FIRST_PORT + crc32(job.encode()) % PORTS
            rank = _number(environment, names.rank, 0)
            return Place(names.launcher, rank, size, _number(environment, names.local_rank, 0), local, master, port)
    return None


def _by_slurm(environment: Mapping[str, str]) -> Place | None:
    """Of a task that srun started; a batch script's own process is none."""
    if not in_step(environment):
        return None
    rank, size = _number(environment, "SLURM_PROCID", 0), _slurm_tasks(environment)
    host = _number(environment, "SLURM_NODEID", 0)
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    master = environment.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
    number = _number(environment, "SLURM_JOB_ID", 0) * 7 + _number(environment, "SLURM_STEP_ID", 0)
    port = _number(environment, "MASTER_PORT", 0) or FIRST_PORT + number % PORTS
    local = _number(environment, "SLURM_LOCALID", 0)
    return Place("srun", rank, size, local, _tasks_on(tasks, host), master, port)


def _carries_mpi(mpi: Place, slurm: Place) -> bool:
    """Whether a task of srun is only mpirun's daemon on a host: in a job of SLURM's it starts one on each but its own.

    What the daemon starts inherits the daemon's place.
    """
    return mpi.hosts > 1 and slurm.local_size == 1 and slurm.size < mpi.hosts


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has a step number too, one that no step has."""
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < 2**31


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))


def _tasks_on(text: str, host: int) -> int | None:
    """Tasks of a host by SLURM's list: the fourth, number 3, of `2(x3),1` has 1; None where the list is shorter."""
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        host -= int(times or 1)
        if host < 0:
            return int(tasks)
    return None


def _agreed(places: list[Place], environment: Mapping[str, str]) -> Place:
    """The first of places that say the same; those of a world of one beside a larger one do not."""
    first = places[0]
    for other in places[1:]:
        if (other.rank, other.size) != (first.rank, first.size):
            raise ConfigError(
                f"two launchers: {first}, {other}; start the command with one of them, and unset the variables that "
                f"{first.launcher} left" + (" (RANK, WORLD_SIZE, LOCAL_RANK)" if "RANK" in environment else "")
            )
    return first


def _refuse_islands(own: Place, others: list[Place], environment: Mapping[str, str]) -> None:
    """ConfigError where a cluster's launcher started several torchruns that do not know of each other."""
    agents = _number(environment, "GROUP_WORLD_SIZE", _number(environment, "CROSS_SIZE", 1))
    for outer in others:
        if outer.size > 1 and agents == 1:
            raise ConfigError(
                f"{outer.launcher} started {outer.size} {own.launcher}s, and each is a world of its own; give each "
                f"--nnodes {outer.size} and one --rdzv-endpoint (torchrun --help), or let {outer.launcher} start "
                "shardwright itself"
            )


def _refuse_to_be_alone(place: Place | None, environment: Mapping[str, str]) -> None:
    """ConfigError for a world of one process that was started beside the tasks or nodes of a job of several."""
    how = "was started beside them" if place is None else f"({place}) was started as one"
    tasks, hosts = _number(environment, "SLURM_NTASKS", 1), _number(environment, "SLURM_JOB_NUM_NODES", 1)
    if "SLURM_JOB_ID" in environment and not in_step(environment) and max(tasks, hosts) > 1:
        name, number, what = ("SLURM_NTASKS", tasks, "tasks") if tasks > 1 else ("SLURM_JOB_NUM_NODES", hosts, "nodes")
        raise ConfigError(
            f"{name}={number}: the job has {number} {what}, but this process {how} and would train alone; put srun in "
            "front of the command" + ("" if tasks > 1 else ", with its --ntasks-per-node")
        )
    nodes = environment.get("PET_NNODES", "1")
    if nodes.isdecimal() and int(nodes) > 1:
        how = "was not started by torchrun" if place is None else f"({place}) was not started as one of them"
        raise ConfigError(
            f"PET_NNODES={nodes}: the job has {nodes} nodes, but this process {how} and would train alone; start it as "
            "torchrun -m shardwright train ..."
        )


def _address(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return None


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: is no whole number; start several processes with torchrun") from None
