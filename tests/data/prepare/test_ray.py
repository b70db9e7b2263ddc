"""prepare on a real Ray: the bytes of one process, whatever the partitions and whoever is killed.

One Ray of two cores for all tests here, and one more for the command line.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from shardwright.config import ConfigError, RunError
from shardwright.data.prepare import PrepareConfig, duplicates, prepare, ray_pool, records
from tests import netns

if importlib.util.find_spec("ray") is None:  # importing it here would choose where it listens
    pytest.skip("needs Ray: pip install 'shardwright[ray]'", allow_module_level=True)
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.in_turn
ROOT = Path(__file__).parents[3]
RECIPE = {
    "tokenizer": {"vocab_size": 400, "sample_mib": 1},
    "dedup": {"near": True, "threshold": 0.5, "permutations": 32, "words": 2},
    "shard_tokens": 16384,
    "validation_every": 5,
    "starts": True,
}


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, as `--engine ray` starts it; prepare finds it running."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with ray_pool.connected(None, 2) as connected:
        yield connected
    assert signal.getsignal(signal.SIGTERM) is on_sigterm and not connected.is_initialized()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, english, poems):
    """1.4 MB with exact and near-duplicates, near and far apart, in two files."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [text[:20000] for text in english] + poems
    texts += [text[: len(text) // 2] + " changed " + text[len(text) // 2 :] for text in texts[::3]] + texts[::7]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines[:300]))
    (folder / "b.jsonl").write_text("".join(lines[300:]))
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory, digests):
    """What one process makes of the corpus."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    manifest = prepare(config(corpus, output, engine="processes", workers=1), progress=False)
    found = manifest.counts["duplicates"]
    assert found["exact"] > 10 and found["near"] > 50 and len(manifest.splits["train"].shards) > 10
    return digests(output)


def config(corpus, output, **options):
    return PrepareConfig(input=[str(corpus)], output=str(output), **RECIPE | {"engine": "ray"} | options)


def workers_at(task: str, parent: psutil.Process | None = None) -> list[psutil.Process]:
    """Ray's worker processes that are at this task now: their titles say so."""
    found = (parent or psutil.Process()).children(recursive=True)
    return [process for process in found if title(process) == f"ray::{task}"]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_ray_does_not_show(ray, corpus, undisturbed, tmp_path, digests):
    prepare(config(corpus, tmp_path / "out"), progress=False)
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(("unit", "group", "rows", "documents"), [(50_000, 20_000, 1000, 30), (300_000, 1, 500, 200)])
def test_partitions_do_not_show(ray, corpus, undisturbed, tmp_path, digests, monkeypatch, unit, group, rows, documents):
    """Other units, groups, partitions and bins, as another corpus size or another release would choose them."""
    monkeypatch.setattr(records, "UNIT_BYTES", unit)
    monkeypatch.setattr(duplicates, "GROUP_BYTES", group)
    monkeypatch.setattr(duplicates, "PARTITION_ROWS", rows)
    monkeypatch.setattr(duplicates, "BIN_DOCUMENTS", documents)
    prepare(config(corpus, tmp_path / "out", workers=3), progress=False)
    assert digests(tmp_path / "out") == undisturbed


def test_broken_input_is_told_as_by_one_process(ray, corpus, tmp_path):
    (tmp_path / "bad.jsonl").write_text((corpus / "b.jsonl").read_text() + '{"text": 3}\n')
    said = []
    for engine in ("processes", "ray"):
        with pytest.raises(ConfigError, match="bad.jsonl: line .* of type int, expected text") as error:
            prepare(config(tmp_path / "bad.jsonl", tmp_path / engine, engine=engine), progress=False)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.fixture
def pieces(corpus, tmp_path, monkeypatch):
    """The corpus in ten files, each of which is a stretch that a worker reads."""
    monkeypatch.setattr(records, "STRETCH_BYTES", 1)
    lines = "".join((corpus / name).read_text() for name in ("a.jsonl", "b.jsonl")).splitlines(keepends=True)
    (tmp_path / "in").mkdir()
    for number, start in enumerate(range(0, len(lines), 60)):
        (tmp_path / "in" / f"{number:02d}.jsonl").write_text("".join(lines[start : start + 60]))
    return tmp_path / "in"


def test_workers_read_where_there_is_enough_to_read(ray, pieces, undisturbed, tmp_path, digests):
    """Each file by a worker, a broken one told as by one process; mended, only what is missing is read."""
    whole = (pieces / "08.jsonl").read_text()
    (pieces / "08.jsonl").write_text(whole + '{"text": 3}\n')
    said = []
    for engine in ("processes", "ray"):
        with pytest.raises(ConfigError, match="08.jsonl: line 61: .* of type int, expected text") as error:
            prepare(config(pieces, tmp_path / engine, engine=engine), progress=False)
        said.append(str(error.value))
    assert said[0] == said[1]
    (pieces / "08.jsonl").write_text(whole)
    for engine in ("processes", "ray"):
        prepare(config(pieces, tmp_path / engine, engine=engine), progress=False)
        found = digests(tmp_path / engine)
        assert {**found, "manifest.json": undisturbed["manifest.json"]} == undisturbed  # which names the files
    assert digests(tmp_path / "processes") == digests(tmp_path / "ray")


def test_input_that_a_node_cannot_open_is_read_here(ray, corpus, tmp_path):
    pool = ray_pool.RayPool(ray, 2)
    assert pool.can_open([str(corpus / "a.jsonl"), f"file://{corpus}/b.jsonl"])
    assert not pool.can_open([str(corpus / "a.jsonl"), str(tmp_path / "elsewhere.jsonl")])
    assert not pool.can_open(["hf:somebody/something"])


# --- lost workers ---------------------------------------------------------------------------------------------------


def catch_one(task: str, parent: psutil.Process | None = None) -> psutil.Process | None:
    """The first worker (of this raylet) that is seen at this task, stopped, so that it cannot finish."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in workers_at(task, parent)[:1]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                if title(process) == f"ray::{task}":
                    return process
                process.resume()
        time.sleep(0.002)
    return None


def kill_one(task: str, killed: list[int]) -> None:
    """kill -9 of a worker in the middle of this task."""
    process = catch_one(task)
    if process is not None:
        process.kill()
        killed.append(process.pid)


@pytest.mark.faults
@pytest.mark.parametrize("task", ["clean_stretch", "scatter_bands", "encode_unit"])
def test_a_killed_worker_costs_its_task_only(ray, pieces, undisturbed, tmp_path, digests, monkeypatch, capsys, task):
    """kill -9 of a worker in the middle of a task: that task is started twice, and no other."""
    monkeypatch.setattr(records, "UNIT_BYTES", 100_000)
    monkeypatch.setattr(duplicates, "GROUP_BYTES", 100_000)
    started: Counter[str] = Counter()
    starter = ray_pool._starter

    def counting(ray, function):
        start = starter(ray, function)

        def call(arguments):
            first = arguments[0]
            which = first.number if hasattr(first, "number") else arguments[:2]
            started[f"{function.__name__} {which}"] += 1
            return start(arguments)

        return call

    monkeypatch.setattr(ray_pool, "_starter", counting)
    killed: list[int] = []
    thread = threading.Thread(target=kill_one, args=(task, killed))
    thread.start()
    prepare(config(pieces, tmp_path / "out"), progress=False)
    thread.join()
    assert killed and not psutil.pid_exists(killed[0])
    found = digests(tmp_path / "out")
    assert {**found, "manifest.json": undisturbed["manifest.json"]} == undisturbed  # which names the files
    twice = {name: count for name, count in started.items() if count > 1}
    assert len(started) > 30 and len(twice) == 1
    assert set(twice.values()) == {2} and next(iter(twice)).startswith(task)
    assert f"a worker of Ray was lost (WorkerCrashedError); its task, {task}, is done again" in capsys.readouterr().err


def dies_once(marker: Path) -> str:
    """A task whose worker is killed the first time."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "here"


@pytest.mark.faults
def test_a_worker_lost_while_nodes_are_asked_is_asked_again(ray, tmp_path):
    assert [found() for _, found in ray_pool._ask_nodes(ray, dies_once, tmp_path / "marker")] == ["here"]


@pytest.mark.faults
def test_a_task_that_kills_every_worker_is_given_up(ray, capsys):
    with pytest.raises(RunError, match="4 workers were lost at the same task, _exit .*Run again to go on"):
        list(ray_pool.RayPool(ray, 2)(os._exit, [(1,)]))
    assert capsys.readouterr().err.count("is done again") == 3


@pytest.mark.faults
def test_killed_as_a_whole_it_leaves_nothing_running_and_goes_on(ray, corpus, tmp_path, digests, capsys):
    """kill -9 of the command while it cleans; all of its Ray ends, and it goes on under either engine."""
    big = tmp_path / "big.jsonl"  # more than a unit, so that there is something to go on from
    big.write_text("".join((corpus / name).read_text() for name in ("a.jsonl", "b.jsonl")) * 3)
    output = tmp_path / "out"
    settings = ["tokenizer.vocab_size=400", "shard_tokens=65536", "workers=2"]
    command = [sys.executable, "-m", "shardwright", "prepare", big, "--output", output, "--engine", "ray", *settings]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    while not any((output / ".prepare" / "clean").rglob("*.part")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in title(child) for child in started)
    process.kill()
    process.communicate()
    helpers = [child for child in started if title(child).endswith("Agent")]  # Ray's, which take a minute to notice
    _, alive = psutil.wait_procs([child for child in started if child not in helpers], timeout=30)
    for child in helpers:
        child.kill()
    assert not alive
    shutil.copytree(output, tmp_path / "other")
    options = {"tokenizer": {"vocab_size": 400}, "shard_tokens": 65536, "workers": 1}
    for folder, engine in ((output, "ray"), (tmp_path / "other", "processes"), (tmp_path / "one", "processes")):
        going_on = PrepareConfig(input=[str(big)], output=str(folder), engine=engine, **options)
        prepare(going_on, progress=False)
        assert ("going on after" in capsys.readouterr().err) == (folder.name != "one")
    assert digests(output) == digests(tmp_path / "other") == digests(tmp_path / "one")


# --- where it listens, and what a user is told ----------------------------------------------------------------------


def test_every_socket_is_on_the_loopback_interface(ray):
    found = []
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            if process != this and "ray" not in " ".join(process.cmdline()):
                continue  # ranks of other tests
            sockets = [socket for socket in process.net_connections() if socket.status == psutil.CONN_LISTEN]
            found += [(process.name(), socket.laddr.ip) for socket in sockets]
    assert len({name for name, _ in found}) >= 3  # Ray does listen: its store of facts, its daemon, its workers
    assert {address.removeprefix("::ffff:") for _, address in found} == {"127.0.0.1"}, found


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:", "head:port", "http://head:1", ":6379"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ValidationError, match="expected HOST:PORT of the cluster's head node, or auto"):
        config("x", "y", ray_address=address)


def test_an_address_goes_with_ray():
    with pytest.raises(ValidationError, match="ray_address belongs to engine=ray"):
        config("x", "y", engine="processes", ray_address="auto")


def test_nobody_at_the_address(corpus, tmp_path):
    with pytest.raises(ConfigError, match="ray_address=127.0.0.1:9: nobody answers there .*`ray start --head` prints"):
        prepare(config(corpus, tmp_path / "out", ray_address="127.0.0.1:9"), progress=False)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two hosts, in network namespaces of their own, joined by `ray start`; (network, address of the head)."""
    if reason := netns.why_not():
        pytest.skip(reason)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # Ray here is on the loopback interface
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--object-store-memory=100000000"]
    # Paths of Ray's sockets have to be short.
    with netns.network(tmp_path / "net", 2, sshd=False) as net, tempfile.TemporaryDirectory(dir="/tmp") as sessions:
        head = f"{net.address('h0')}:6379"
        for host in net.hosts:  # without a route to anywhere Ray would not find its own address
            netns.ip("-n", net.space(host), "route", "add", "default", "dev", "eth0")
        there = [f"--address={head}"], ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={sessions}"]
        for host, options in zip(net.hosts, reversed(there), strict=True):
            started = run(*net.within(host, *start, f"--node-ip-address={net.address(host)}", *options))
            assert started.returncode == 0, started.stdout + started.stderr
        yield net, head


@pytest.mark.faults
def test_a_lost_node_costs_the_tasks_it_was_at(cluster, corpus, tmp_path, digests):
    """kill -9 of every process of a host, while it writes a shard; the answer is still one JSON object."""
    net, head = cluster
    settings = ["tokenizer.vocab_size=300", "tokenizer.sample_mib=1", "shard_tokens=4096", "--json"]
    command = [sys.executable, "-m", "shardwright", "prepare", str(corpus), "--output", str(tmp_path / "out")]
    command = net.within("h0", *command, "--engine", "ray", "--ray-address", head, *settings)
    (raylet,) = [process for pid in net.pids("h1") if (process := psutil.Process(pid)).name() == "raylet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    caught = catch_one("write_shard", raylet)
    for pid in net.pids("h1"):
        os.kill(pid, signal.SIGKILL)
    said, errors = process.communicate(timeout=120)
    assert caught and process.returncode == 0 and "its task, write_shard, is done again" in errors, errors
    assert json.loads(said)["output"] == str(tmp_path / "out")
    options = {"tokenizer": {"vocab_size": 300, "sample_mib": 1}, "shard_tokens": 4096, "workers": 1}
    prepare(PrepareConfig(input=[str(corpus)], output=str(tmp_path / "one"), **options), progress=False)
    assert digests(tmp_path / "out") == digests(tmp_path / "one")


def test_a_node_that_does_not_see_the_output_is_named(ray, corpus, tmp_path):
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a folder of one process alone takes root and unshare (Debian: apt-get install util-linux)")
    alone = f'mount -t tmpfs none {shlex.quote(str(tmp_path))} && exec "$@"'
    refused = run("unshare", "--mount", "sh", "-c", alone, "sh", *on_cluster(ray, corpus, tmp_path / "out"))
    expected = f"ray node 127.0.0.1: does not see {tmp_path}/out/.prepare; choose an output= that all nodes share"
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, f"shardwright: {expected}")


def on_cluster(ray, corpus, output) -> list[str]:
    """The command, for the cluster that is running."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "shardwright", "prepare", str(corpus), "--output", str(output)]
    return [*command, "--engine", "ray", "--ray-address", address, "tokenizer.vocab_size=300", "tokenizer.sample_mib=1"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_ray_one_line_names_the_extra(corpus, tmp_path):
    """And nothing else needs Ray: the same corpus is prepared without it."""
    hidden = "import sys; sys.modules['ray'] = None\nfrom shardwright.launcher.cli import main\nmain()"
    command = [sys.executable, "-c", hidden, "prepare", str(corpus / "a.jsonl"), "tokenizer.vocab_size=300"]
    refused = run(*command, "--output", str(tmp_path / "a"), "--engine", "ray")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines() == ["shardwright: engine=ray needs Ray: pip install 'shardwright[ray]'"]
    assert run(*command, "--output", str(tmp_path / "b"), "workers=1").returncode == 0


def test_nothing_else_imports_ray():
    importing = set()
    for path in (ROOT / "shardwright").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            importing |= {path.name for name in names if name.split(".")[0] == "ray"}
    assert importing == {"ray_pool.py"}
