"""The steps of `doctor --cluster`, as one rank does them.

Between rollcall.py and cluster.py. A step gives words for the case that all is well, or raises `Fault`, on the ranks
where it is not; where ranks wait for each other inside of a step, a fault is raised only after that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from shardwright import __version__
from shardwright.config import Config, ConfigError
from shardwright.hardware import memory
from shardwright.launcher.checks import GIB, driver_devices
from shardwright.launcher.network import bind, choose_interface, find_route, interface_address
from shardwright.launcher.rollcall import Fault, RollCall
from shardwright.launcher.world import Place, is_loopback
from shardwright.log import quantity
from shardwright.model.count import num_parameters
from shardwright.parallel.mesh import choose_device, mesh_shape
from shardwright.parallel.proposals import check_layout
from shardwright.train.build import build_corpus, fit_to_corpus
from shardwright.train.layout import build_facts
from shardwright.train.preview import rank_memory
from shardwright.train.settings import read_config

PACKAGE = Path(__file__).resolve().parents[1]
MOST_SKEW_S, ROUNDS = 2.0, 3
CONNECT_S = 10.0
SEE_S = 20.0  # for a new file to show on other hosts: NFS remembers for some seconds what a folder had
LEAST_BYTES = GIB  # of disk and memory, where no config says more
BYTES_A_PARAMETER = 12  # of a checkpoint: float32 weights and two moments
REDUCED_BYTES, REPEATS = 1_000_000, 5
FOLDER_REMEDY = "mend its permissions, or choose another folder with run=PATH"


@dataclass
class Site:
    """One rank among all, and what its steps leave for later ones."""

    place: Place
    book: RollCall
    source: str | None = None
    overrides: Sequence[str] = ()
    config: Config | None = None
    hosts: int = 1
    skew: tuple[float, float] = (0.0, 0.0)  # seconds ahead of rank 0, give or take
    free: list[float] = field(default_factory=lambda: [math.inf, math.inf])  # GiB of disk and memory
    device: torch.device = torch.device("cpu")
    notes: dict[str, str] = field(default_factory=dict)  # what is known of a step only after it
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def leads(self) -> bool:
        """Whether this rank says what was found."""
        return self.place.rank == 0

    @property
    def leads_host(self) -> bool:
        """Whether this rank looks at what all ranks of a host share."""
        return self.place.local_rank == 0

    @property
    def folder(self) -> Path:
        """Where the run writes; without a config this folder."""
        return Path("" if self.config is None else self.config.run or "").absolute()


# ------------------------------------------------------------------------------------------ versions, config


def read_versions() -> dict[str, str]:
    """What has to be equal on all ranks; `source` is a hash of the package's own files."""
    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA": str(torch.version.cuda or "none"),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else "none",
        "shardwright": __version__,
        "source": fingerprint(PACKAGE),
        "device": "GPU" if gpu else "CPU",
    }


def fingerprint(root: Path) -> str:
    """Of the Python files below a folder: in a checkout a version says little."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_versions(site: Site) -> str:
    """Every rank has what rank 0 has."""
    own = read_versions()
    if site.leads:
        site.book.write("versions", json.dumps(own))
    first = json.loads(site.book.read("versions"))
    different = [
        f"{key} is {value}, on rank 0 {first.get(key)}" for key, value in own.items() if value != first.get(key)
    ]
    if different:
        raise Fault(", ".join(different), "install the same packages and files on all hosts, or share one environment")
    return ", ".join(f"{key} {value}" for key, value in own.items() if value != "none")


def check_config(site: Site) -> str:
    """The config can be read everywhere, says the same, and its layout fits the world."""
    if site.source is None:
        return "none given, so its layout, run folder and needs are not looked at"
    problem = None
    try:
        site.config = config = read_config(site.source, site.overrides)
        mesh_shape(config.parallel, site.place.size)
        check_layout(build_facts(config, site.place.size))
    except ConfigError as error:
        site.config, problem = None, Fault(str(error))
    own = "" if site.config is None else hashlib.sha256(site.config.model_dump_json().encode()).hexdigest()[:12]
    if site.leads:
        site.book.write("config", own)
    first = site.book.read("config")
    if problem is not None:
        raise problem
    if first and own != first:
        raise Fault(f"{site.source} is another config here than on rank 0", "share the file, or copy it to every host")
    return site.source


def check_data(site: Site) -> str:
    """The corpora are seen from every host, with the tokenizer that the config goes by."""
    if site.config is None:
        return ""
    corpus = build_corpus(site.config)
    fit_to_corpus(site.config, corpus)
    tokens = sum(split.tokens for manifest in corpus.manifests for split in manifest.splits.values())
    return f"{len(corpus.manifests)} prepared, {quantity(tokens)} tokens"


# ------------------------------------------------------------------------------------------ names, interface, ports


def check_interface(site: Site) -> str:
    """The interface that gloo will use exists, is up, and leads out of this host where there are several."""
    place = site.place
    assert place.master is not None
    choose_interface(place)
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0] or find_route(place.master).interface
    advice = "unset GLOO_SOCKET_IFNAME, and the interface of the route to rank 0 is taken (ip addr lists all)"
    state, address = psutil.net_if_stats().get(name), interface_address(name)
    if state is None:
        raise Fault(f"GLOO_SOCKET_IFNAME={name}: this host has no such interface", advice)
    if not state.isup or address is None:
        raise Fault(
            f"interface {name} {'has no address' if state.isup else 'is down'}", f"ip link set {name} up, or {advice}"
        )
    if site.hosts > 1 and is_loopback(address):
        raise Fault(f"interface {name} reaches this host only, and the ranks are on {site.hosts}", advice)
    site.book.write(f"address/{place.rank}", address)
    return f"{name} {address} on rank 0"


def check_ports(site: Site) -> str:
    """Each rank reaches a port of a rank of the next host, as gloo and NCCL will, and it is that rank that answers."""
    place, book = site.place, site.book
    step = place.local_size if place.local_size and place.local_size < place.size else 1
    peer = (place.rank + step) % place.size
    own = secrets.token_hex(8)
    server = site.stack.enter_context(bind(book.read(f"address/{place.rank}")))
    threading.Thread(target=_answer, args=(server, own.encode()), daemon=True).start()
    address, port = server.getsockname()[:2]
    book.write(f"port/{place.rank}", f"{address} {port} {own} {socket.gethostname()}")
    address, number, word, host = book.read(f"port/{peer}").split()
    try:
        with socket.create_connection((address, int(number)), timeout=min(CONNECT_S, book.limit_s)) as link:
            found = link.recv(100).decode(errors="replace")
    except OSError as error:
        raise Fault(
            f"cannot connect to rank {peer} on {host} ({address}): {error.strerror or error}",
            "open TCP ports between the hosts (sysctl net.ipv4.ip_local_port_range has their range), or choose another "
            "interface with GLOO_SOCKET_IFNAME",
        ) from None
    if found != word:
        raise Fault(
            f"{address}, said to be rank {peer} on {host}, is answered by another process",
            "choose an interface whose addresses are each of one host, with GLOO_SOCKET_IFNAME",
        )
    return f"each rank reaches the one {step} further"


def _answer(server: socket.socket, word: bytes) -> None:
    with suppress(OSError):  # until it is closed
        while True:
            link, _ = server.accept()
            with link:
                link.sendall(word)


# ------------------------------------------------------------------------------------------ clock


def read_clock() -> float:
    """Seconds since 1970 as this host has them."""
    return time.time()


def check_clock(site: Site) -> str:
    """This host's clock against that of rank 0, which looks at its own before and after all others look at theirs."""
    best = 0.0, math.inf
    for number in range(ROUNDS):
        own, begin, end = _read_together(site, number)
        if (end - begin) / 2 < best[1]:
            best = own - (begin + end) / 2, (end - begin) / 2
    skew, bound = site.skew = (0.0, best[1]) if site.leads else best
    if abs(skew) - bound > MOST_SKEW_S:
        raise Fault(
            f"the clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} that of rank 0",
            "let chrony or ntpd set the clocks of all hosts: logs, times of files and signed requests go by them",
            f"known to {bound * 1e3:.1f} ms",
        )
    return f"known to {bound * 1e3:.1f} ms"


def _read_together(site: Site, number: int) -> tuple[float, float, float]:
    """(own clock, rank 0's before, rank 0's after)."""
    book, begin, end = site.book, f"begin/{number}", f"end/{number}"
    book.attend(f"clock {number}")
    if site.leads:
        book.write(begin, repr(read_clock()))
    before = float(book.read(begin))
    own = read_clock()
    book.attend(f"clock {number} read")
    if site.leads:
        book.write(end, repr(read_clock()))
    return own, before, float(book.read(end))


# ------------------------------------------------------------------------------------------ folder, disk, memory


def check_folder(site: Site) -> str:
    """A file that rank 0 writes into the run folder shows on every host, and every host can write there."""
    if site.config is None:
        return ""
    problem = None
    if site.leads:
        name = f".doctor-{secrets.token_hex(8)}"
        try:
            _make_probe(site.folder, name, site.stack)
        except OSError as error:
            name, problem = "", Fault(f"{site.folder} cannot be written: {error.strerror or error}", FOLDER_REMEDY)
        site.book.write("probe", name)
    name = site.book.read("probe")
    if problem is not None:
        raise problem
    if name and site.leads_host:
        _look_for_probe(site.folder / name, f"{site.place.rank}")
    return f"{site.folder} is one on all hosts" if site.hosts > 1 else f"{site.folder} can be written"


def _make_probe(folder: Path, name: str, stack: ExitStack) -> None:
    """Make a folder within `folder`; when the stack closes all is as it was."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(new):
        stack.callback(_remove_empty, path)
    stack.callback(shutil.rmtree, folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    (folder / name / "seen").write_text(name)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _look_for_probe(place: Path, own: str) -> None:
    """Fault where it does not show here, or nothing can be written beside it."""
    deadline = time.monotonic() + SEE_S
    while not (place / "seen").is_file():
        if time.monotonic() > deadline:
            raise Fault(
                f"{place.parent}: what rank 0 writes there does not show here within {SEE_S:g} s",
                "put the run on a file system that all hosts share, under the same path: run=PATH",
            )
        time.sleep(0.05)
    try:
        (place / own).write_text(own)
    except OSError as error:
        raise Fault(f"{place.parent} cannot be written: {error.strerror or error}", FOLDER_REMEDY) from None


def check_disk(site: Site) -> str:
    """Room for two checkpoints where the run writes; without a config, a GiB."""
    if not site.leads_host:
        return ""
    place = next(path for path in (site.folder, *site.folder.parents) if path.exists())
    need = LEAST_BYTES
    if site.config is not None:
        need = 2 * BYTES_A_PARAMETER * num_parameters(site.config.model)["total"]  # type: ignore[arg-type]
    site.free[0] = (free := shutil.disk_usage(place).free) / GIB
    if free < need:
        raise Fault(
            f"{place} has too little room: two checkpoints take {need / GIB:.2f} GiB",
            "free space, or write elsewhere with run=PATH", f"{free / GIB:.2f} GiB are free",
        )  # fmt: skip
    return f"at least {need / GIB:.2f} GiB are needed"


def check_memory(site: Site) -> str:
    """What the step is estimated to take, of the GPU or of the host's memory shared by its ranks."""
    place, config = site.place, site.config
    need = LEAST_BYTES if config is None else rank_memory(config, build_facts(config, place.size))["total"]
    if site.device.type == "cuda":
        free, sharers, where = torch.cuda.mem_get_info(site.device)[0], 1, "its GPU"
    else:
        free, sharers, where = memory()[1], place.local_size or 1, "its host"
    site.free[1] = free / GIB
    if free < need * sharers:
        raise Fault(
            f"{where} has too little memory: {sharers} x {need / GIB:.2f} GiB are estimated",
            "lower batch.micro, raise parallel.zero or the tensor degree, or end what else runs there",
            f"{free / GIB:.2f} GiB are free",
        )
    return f"{need / GIB:.2f} GiB a rank {'are needed' if config is None else 'estimated'}"


# ------------------------------------------------------------------------------------------ devices, all-reduce


def check_device(site: Site) -> str:
    """Each rank has a device, and this torch has kernels for it."""
    wanted = "auto" if site.config is None else site.config.train.device
    driver = driver_devices()
    if wanted != "cpu" and driver and not torch.cuda.is_available():
        raise Fault(
            f"the driver has {driver}, but torch {torch.__version__} does not see it",
            "install a torch build for the driver's CUDA: pytorch.org/get-started",
        )
    site.device = choose_device(wanted, site.place.local_rank)
    if site.device.type != "cuda":
        return str(site.device)
    name, capability = torch.cuda.get_device_name(site.device), torch.cuda.get_device_capability(site.device)
    known = torch.cuda.get_arch_list()
    if torch.version.cuda and known and not has_kernels(capability, known):
        card, kernels = f"{name} is sm_{capability[0]}{capability[1]}", f"kernels for {', '.join(known)}"
        raise Fault(
            f"{card}, and torch {torch.__version__} has {kernels}",
            "install a torch build that has them (pytorch.org/get-started/previous-versions), or leave the card out "
            "with CUDA_VISIBLE_DEVICES",
        )
    try:
        torch.ones(8, device=site.device).sum().item()
    except RuntimeError as error:
        raise Fault(
            f"{name} does not compute: {str(error).splitlines()[0]}", "see nvidia-smi and dmesg there"
        ) from None
    return name


def has_kernels(capability: tuple[int, int], known: Sequence[str]) -> bool:
    """Whether a torch built for `known` (torch.cuda.get_arch_list) runs on a card of this compute capability.

    By NVIDIA's rules of compatibility (CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility"): a
    binary for sm_Xy runs on cards X.z with z >= y, one with the suffix `a` only on X.y, one with `f` as one without;
    PTX for compute_Xy is compiled by the driver for every later card, with a suffix `a` for X.y only.
    """
    own = capability[0] * 10 + capability[1]
    for word in known:
        kind, _, name = word.partition("_")
        number, exact = int(name.rstrip("af")), name.endswith("a")
        if exact and number == own:
            return True
        if not exact and (number <= own if kind == "compute" else number // 10 == own // 10 and number <= own):
            return True
    return False


def check_all_reduce(site: Site) -> str:
    """The sum over all ranks is right, by the backends of the run; and the extremes of what ranks measured."""
    place, patience = site.place, timedelta(seconds=site.book.limit_s / 2)  # less than the others wait for this step
    backend = "cpu:gloo,cuda:nccl" if site.device.type == "cuda" else "gloo"
    try:
        if site.device.type == "cuda":
            torch.cuda.set_device(site.device)
        dist.init_process_group(
            backend, store=site.book.part("group"), rank=place.rank, world_size=place.size, timeout=patience
        )
        wrong, seconds = _reduce(place.size, place.rank, site.device)
        worst = torch.tensor([abs(site.skew[0]), *(-free for free in site.free)], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    except RuntimeError as error:
        raise Fault(
            f"an all-reduce by {backend} fails",
            "see what the other ranks say; NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL tells more",
            str(error).splitlines()[0],
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if wrong is not None:
        raise Fault(f"the sum of an all-reduce is {wrong}", "memory, network card or driver: leave this host out")
    skew, disk, free = worst.tolist()
    site.notes = {
        "clock": f"; the largest difference is {skew * 1e3:.1f} ms",
        "disk": f"; {-disk:.1f} GiB free where least",
        "memory": f"; {-free:.1f} GiB free where least",
    }
    bus = 2 * (place.size - 1) / place.size * REDUCED_BYTES / seconds
    return f"{backend}: 1 MB in {seconds * 1e3:.2f} ms, {quantity(bus, ' ')}B/s bus bandwidth"


def _reduce(size: int, rank: int, device: torch.device) -> tuple[str | None, float]:
    """(a sum that is wrong, in words, median seconds of one all-reduce). Small whole numbers, so sums are exact."""
    right = sum(other % 8 + 1 for other in range(size))
    wrong, times = None, []
    for _ in range(REPEATS):
        data = torch.full((REDUCED_BYTES // 4,), float(rank % 8 + 1), device=device)
        begin = time.perf_counter()
        dist.all_reduce(data)
        least, most = data.min().item(), data.max().item()  # waits for a GPU as well
        times.append(time.perf_counter() - begin)
        if not least == most == right:
            wrong = f"{least:g} to {most:g} instead of {right}"
    return wrong, statistics.median(times)
