"""`prepare` on Ray: the same tasks as `pool` runs, on the processes of a Ray cluster. Part of `prepare`.

Without an address Ray is started on this machine alone: every socket on the loopback interface, behind a token that is
made for this run, no dashboard, no usage statistics; it ends with the preparation. With an address the work goes to a
cluster that others started and secure; all its nodes have to see the output folder.

The process that calls `prepare` hands out tasks and takes results in order; it reads the input only where there are
fewer stretches of it than cores, or a node cannot open it. A worker that is lost
(killed, out of memory, its node gone) costs the task it was at: that is handed out again, and said.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shardwright import __version__
from shardwright.config import ConfigError, RunError
from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.pool import Pool, num_workers
from shardwright.data.prepare.streams import open_raw
from shardwright.log import get_logger

ATTEMPTS = 4  # at one task, before it is taken for what kills the workers
STORE_BYTES = 256 << 20  # Ray's shared memory on one machine: units of 2 MiB on their way; what is more goes to disk
ANSWER_S = 60.0  # for a node's first answer; it may have to start a process
CONNECT_S = 5.0
# "0" keeps Ray to the loopback interface.
_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_LIBRARIES = ("numpy", "safetensors", "tokenizers", "ftfy", "datasketch", "py3langid", "trafilatura", "sentencepiece")


def check_ray(address: str | None) -> None:
    """ConfigError where Ray is not installed, or nobody listens at the address."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine=ray needs Ray: pip install 'shardwright[ray]'")
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ray_address={address}: nobody answers there ({error}); expected HOST:PORT as `ray start --head` prints it"
        ) from None


@contextmanager
def ray_pool(config: PrepareConfig, work: Path) -> Iterator[Pool]:
    """A pool whose tasks run on Ray. `work` is the folder that all nodes have to see.

    A program that has called `ray.init` itself keeps its connection, and prepare works there.
    """
    with connected(config.ray_address, config.workers) as ray:
        _check_nodes(ray, work)
        yield RayPool(ray, config.workers)


@contextmanager
def connected(address: str | None, workers: int) -> Iterator[Any]:
    """The `ray` module, connected to the cluster at `address`, or (None) to one of this machine alone."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield sys.modules["ray"]
        return
    ray = _import_ray(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            _start_here(ray, workers)
        else:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "Ray cannot be started here" if address is None else f"ray_address={address}: no connection"
        raise ConfigError(f"{where}: {_first_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():  # where Ray has set its own
            signal.signal(signal.SIGTERM, on_sigterm or signal.SIG_DFL)


def _import_ray(address: str | None) -> Any:
    """Ray, which reads these variables once, when it is imported; ConfigError where that was otherwise before."""
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            os.environ[_SEVERAL_MACHINES] = "0"
            if "RAY_AUTH_MODE" not in os.environ:
                os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        else:
            os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 40 s, before a connection is given up
    import ray
    from ray._private.ray_constants import ENABLE_RAY_CLUSTER

    if address is None and ENABLE_RAY_CLUSTER:
        raise ConfigError(
            "engine=ray: this process has imported Ray, which would listen on all interfaces; call ray.init() "
            "before prepare, or prepare in a process of its own"
        )
    return ray


def _start_here(ray: Any, workers: int) -> None:
    ray.init(
        address="local",
        num_cpus=workers or num_workers(0),
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        logging_level="warning",
    )


# --- tasks ----------------------------------------------------------------------------------------------------------


@dataclass
class _Task:
    """A task under way, and how to start it again."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Any
    attempt: int = 1


class RayPool:
    """Runs tasks on a Ray that is connected, on so many cores at a time (0 takes all there are)."""

    def __init__(self, ray: Any, workers: int) -> None:
        self.ray, self.workers = ray, workers

    @property
    def num_cores(self) -> int:
        """Cores that tasks run on; a cluster may grow and shrink."""
        return self.workers or int(self.ray.cluster_resources().get("CPU", 0))

    def __call__(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in the tasks' order; at most two tasks a core are under way, which bounds what is held anywhere."""
        start = _starter(self.ray, function)
        most = 2 * self.num_cores + 2
        pending: deque[_Task] = deque()
        for arguments in tasks:
            pending.append(_Task(function, arguments, start(arguments)))
            if len(pending) >= most:
                yield _result(self.ray, pending.popleft(), start)
        while pending:
            yield _result(self.ray, pending.popleft(), start)

    def can_open(self, locations: list[str]) -> bool:
        """Whether every node can open these inputs itself; the first that cannot is named in the log."""
        for host, found in _ask_nodes(self.ray, try_to_open, locations):
            try:
                reason = found()
            except self.ray.exceptions.RayError as error:
                reason = _first_line(error)
            if reason:
                get_logger().info(f"ray node {host}: cannot open the input ({reason}); this process reads it for all")
                return False
        return True


def _starter(ray: Any, function: Callable[..., Any]) -> Callable[[tuple[Any, ...]], Any]:
    # Ray's own retries are silent, and would be endless where memory is short.
    run = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_run)
    return lambda arguments: run.options(name=function.__name__).remote(function, arguments)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """In a worker: one task. Libraries keep to one thread: the processes are the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(*arguments)


def _result(ray: Any, task: _Task, start: Callable[[tuple[Any, ...]], Any]) -> Any:
    """What the task gives, done again where its worker was lost. An error in the task is raised as it is."""
    errors = ray.exceptions
    while True:
        try:
            return ray.get(task.result)
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError) as e:
            name, reason = task.function.__name__, type(e).__name__
            if task.attempt == ATTEMPTS:
                raise RunError(
                    f"prepare on Ray: {ATTEMPTS} workers were lost at the same task, {name} ({reason}: "
                    f"{_first_line(e)}); is memory short there? Run again to go on where it stopped"
                ) from None
            get_logger().warning(f"a worker of Ray was lost ({reason}); its task, {name}, is done again")
            task.attempt += 1
            task.result = start(task.arguments)
        except errors.RayError as error:
            raise RunError(f"prepare on Ray: {_first_line(error)}; run again to go on where it stopped") from None


# --- nodes ----------------------------------------------------------------------------------------------------------


def _check_nodes(ray: Any, work: Path) -> None:
    """ConfigError where a node does not see the work folder, or has other libraries than this process."""
    if not _working_nodes(ray):
        raise ConfigError("ray_address: no node of this cluster has a CPU for tasks; start one with `ray start`")
    probe = (work / "probe").resolve()
    probe.write_text(secrets.token_hex(16))
    here = look_around(probe)
    for host, found in _ask_nodes(ray, look_around, probe):
        try:
            there = found()
        except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
            reason = _first_line(getattr(error, "cause", None) or error)
            raise ConfigError(
                f"ray node {host}: cannot run a task ({reason}); install this shardwright on every node"
            ) from None
        except ray.exceptions.RayError as error:
            raise RunError(f"ray node {host}: gives no answer ({_first_line(error)}); run again to go on") from None
        for name, value in here.items():
            if name == "probe" and there[name] != value:
                raise ConfigError(f"ray node {host}: does not see {work}; choose an output= that all nodes share")
            if there[name] != value:
                raise ConfigError(f"ray node {host}: has {name} {there[name]}, this process {value}; install the same")
    probe.unlink()


def _working_nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _ask_nodes(ray: Any, function: Callable[[Any], Any], argument: Any) -> list[tuple[str, Callable[[], Any]]]:
    """(address, what waits for the answer) of each node, all asked at once; again where a worker is lost."""
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    ask = ray.remote(num_cpus=0, max_retries=ATTEMPTS - 1)(function)
    found: list[tuple[str, Callable[[], Any]]] = []
    for node in _working_nodes(ray):
        answer = ask.options(scheduling_strategy=pinned(node["NodeID"], soft=False)).remote(argument)
        found.append((node["NodeManagerAddress"], partial(ray.get, answer, timeout=ANSWER_S)))
    return found


def try_to_open(locations: list[str]) -> str:
    """Why one of these inputs cannot be opened here; empty if they all can."""
    for location in locations:
        if location.startswith("hf:"):
            return "a data set of Hugging Face is read by one process"
        try:
            with open_raw(location) as file:
                file.read(1)
        except (OSError, ConfigError, RunError) as error:
            return _first_line(error)
    return ""


def look_around(probe: Path) -> dict[str, str | None]:
    """What has a say in the bytes of the result, and what stands in the probe, as this process sees them."""
    found: dict[str, str | None] = {"probe": probe.read_text() if probe.exists() else None}
    found |= {"Python": platform.python_version().rpartition(".")[0], "shardwright": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
