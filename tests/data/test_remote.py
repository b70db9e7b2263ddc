"""Shards over a real HTTP server that drops connections, cuts bodies, fails and lies."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shardwright.config import ConfigError
from shardwright.data.loader import Loader
from shardwright.data.order import Plan
from shardwright.data.remote import Retry, ShardCache, check_member, join, read_bytes
from shardwright.data.shards import Manifest, ShardError
from shardwright.data.stream import Stream, ValidationStream
from shardwright.data.tokenizers import load_prepared
from shardwright.objective.causal import Causal, CausalConfig
from shardwright.objective.setting import Setting

CAUSAL = Causal(CausalConfig(), Setting(64))
FAST = Retry(attempts=4, base_s=0.001, timeout_s=5)


class Site:
    """A folder over HTTP; `faults[path]` says what to do to the next requests for a path."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.requests = folder, {}, Counter()  # type: ignore[var-annotated]
        self.always: str | None = None
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                site.requests[self.path] += 1
                pending = site.faults.get(self.path)
                site.answer(self, pending.popleft() if pending else site.always)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler, fault: str | None) -> None:
        path = self.folder / handler.path.lstrip("/")
        if fault == "500" or not path.exists():
            handler.send_error(500 if fault == "500" else 404)
            return
        if fault == "drop before":
            self.drop(handler)
            return
        body = path.read_bytes()
        if fault == "wrong bytes":
            body = body[:-7] + bytes(7 * [1])
        claimed = len(body)
        if fault == "shorter file":
            body, claimed = body[: len(body) // 2], len(body) // 2
        handler.send_response(200)
        handler.send_header("Content-Length", str(claimed))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        half = len(body) // 2 if fault in ("drop inside", "truncate") else len(body)
        handler.wfile.write(body[:half])
        if fault == "drop inside":
            self.drop(handler)
        if fault == "truncate":
            handler.close_connection = True

    @staticmethod
    def drop(handler: http.server.BaseHTTPRequestHandler) -> None:
        """Reset the connection."""
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.wfile = open(os.devnull, "wb")  # type: ignore[assignment]  # noqa: SIM115

    def fail(self, path: str, *faults: str) -> None:
        self.faults[path] = deque(faults)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site(folder: Path, tmp_path: Path) -> Iterator[Site]:
    shutil.copytree(folder, tmp_path / "site")
    site = Site(tmp_path / "site")
    yield site
    site.close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", retry=FAST)


def remote(site: Site, cache: ShardCache) -> Stream:
    return Stream([site.url], raw_length=65, stride=64, seed=0, lanes=4, cache=cache)


def files(cache: ShardCache) -> list[Path]:
    return sorted(path for path in Path(cache.folder).rglob("*") if path.is_file())


FAULTS = ["500", "drop before", "drop inside", "truncate", "wrong bytes", "shorter file"]


def test_a_bad_server_changes_nothing_but_time(site: Site, cache: ShardCache, folder: Path) -> None:
    local = Stream([str(folder)], raw_length=65, stride=64, seed=0, lanes=4)
    stream = remote(site, cache)
    infos = Manifest.load(folder).split("train").shards
    for number, info in enumerate(infos):
        first, second = FAULTS[number % 6], FAULTS[(number + 1) % 6]
        site.fail(f"/{info.path}", first, second)
        site.fail(f"/{info.index}", second)
    numbers = np.arange(4 * local.order.sources[0].per_lane)
    assert (stream.sequences(numbers).tokens == local.sequences(numbers).tokens).all()
    assert all(site.requests[f"/{info.path}"] == 3 for info in infos)
    # Each once; a second reader takes the copies from the cache.
    before = sum(site.requests.values())
    assert (remote(site, cache).sequences(numbers).tokens == stream.sequences(numbers).tokens).all()
    assert sum(site.requests.values()) == before + 1  # the manifest
    assert len(files(cache)) == 2 * len(infos) and not [p for p in files(cache) if p.suffix == ".tmp"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "500"),
        ("drop before", "Disconnected|reset|Connection"),
        ("drop inside", "Payload|reset|Connection"),
        ("truncate", "Payload|truncated"),
        ("wrong bytes", "sha256 .* expected .* altered"),
        ("shorter file", r"bytes arrived, expected \d+: the file is truncated"),
    ],
)
def test_a_server_that_stays_bad_is_named(site: Site, cache: ShardCache, fault: str, reason: str) -> None:
    stream = remote(site, cache)
    site.always = fault
    with pytest.raises(ShardError, match=rf"{site.url}/train/000/0000\d\.tar: 4 attempts failed.*({reason})"):
        stream.sequence(0)
    assert files(cache) == []  # nothing half or wrong stays
    site.always = None
    assert len(stream.sequence(0).tokens) == 65  # a run that is started again goes on


def test_what_is_not_there_fails_at_once(site: Site, cache: ShardCache) -> None:
    with pytest.raises(ShardError, match=r"nowhere/manifest\.json: no such file"):
        Stream([f"{site.url}/nowhere"], raw_length=65, stride=64, seed=0, cache=cache)
    for path in (site.folder / "train/000").glob("*.tar"):
        path.unlink()
    with pytest.raises(ShardError, match=r"0000\d\.tar: no such file, though the manifest names it"):
        remote(site, cache).sequence(0)
    assert max(n for path, n in site.requests.items() if path.endswith("tar")) == 1


def test_the_manifest_is_tried_again_too(site: Site, cache: ShardCache) -> None:
    site.fail("/manifest.json", "500", "drop inside")
    assert read_bytes(f"{site.url}/manifest.json", retry=FAST) == (site.folder / "manifest.json").read_bytes()
    assert ValidationStream([site.url], raw_length=65, stride=64, cache=cache).sequences(np.arange(3)).lengths[0] == 65


def test_a_tokenizer_that_arrives_altered_is_asked_for_again(prepared: Path) -> None:
    site = Site(prepared)
    try:
        manifest = Manifest.load(site.url)
        site.fail("/tokenizer.json", "wrong bytes")
        assert load_prepared(manifest).sha256 == manifest.tokenizer["sha256"]
        assert site.requests["/tokenizer.json"] == 2
        site.always = "wrong bytes"
        with pytest.raises(ShardError, match=r"tokenizer.json: 4 attempts failed, .*sha256 .* altered"):
            read_bytes(f"{site.url}/tokenizer.json", sha256=manifest.tokenizer["sha256"], retry=FAST)
    finally:
        site.close()


def test_a_copy_that_goes_bad_on_this_disk_is_fetched_again(site: Site, cache: ShardCache, folder: Path) -> None:
    numbers = np.arange(40)
    wanted = Stream([str(folder)], raw_length=65, stride=64, seed=0, lanes=4).sequences(numbers).tokens
    remote(site, cache).sequences(numbers)
    tars = [path for path in files(cache) if path.suffix == ".tar"]
    for path in tars:
        raw = bytearray(path.read_bytes())
        raw[1100:5000] = bytes(3900)
        path.write_bytes(raw)
    assert (remote(site, cache).sequences(numbers).tokens == wanted).all()
    indexes = [path for path in files(cache) if path.suffix == ".idx"]
    for path in indexes:
        path.write_bytes(path.read_bytes()[:-5])
    tars[0].write_bytes(b"")
    assert (remote(site, cache).sequences(numbers).tokens == wanted).all()


def test_a_source_altered_at_its_origin_is_refused(site: Site, cache: ShardCache) -> None:
    for path in (site.folder / "train/000").glob("*.tar"):
        raw = bytearray(path.read_bytes())
        raw[1100] ^= 1
        path.write_bytes(raw)
    with pytest.raises(ShardError, match=r"0000\d\.tar: 4 attempts failed, .*sha256 .* altered"):
        remote(site, cache).sequence(0)


def test_the_cache_is_bounded_and_drops_the_least_recently_used(site: Site, tmp_path: Path) -> None:
    infos = Manifest.load(site.folder).split("train").shards
    cache = ShardCache(tmp_path / "cache", max_bytes=sum(i.bytes for i in infos[:3]) + 10, retry=FAST)
    places = [cache.fetch(f"{site.url}/{info.path}", info.sha256, info.bytes) for info in infos[:3]]
    for age, path in zip((30, 20, 10), places, strict=True):
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    cache.fetch(f"{site.url}/{infos[0].path}", infos[0].sha256, infos[0].bytes)  # used: now the youngest
    stale = places[0].with_name("x.1.ab.tmp")
    stale.write_bytes(b"left by a killed process")
    os.utime(stale, (1, 1))
    last = cache.fetch(f"{site.url}/{infos[3].path}", infos[3].sha256, infos[3].bytes)
    assert places[0].exists() and last.exists() and not places[1].exists() and not stale.exists()
    assert sum(p.stat().st_size for p in files(cache)) <= cache.max_bytes
    # Too small for even one shard still works, a shard at a time.
    tiny = ShardCache(tmp_path / "tiny", max_bytes=1, retry=FAST)
    numbers = np.arange(60)
    assert (remote(site, tiny).sequences(numbers).tokens == remote(site, cache).sequences(numbers).tokens).all()


def test_readers_share_a_cache_without_locks(site: Site, cache: ShardCache) -> None:
    info = Manifest.load(site.folder).split("train").shards[0]
    found: list[str] = []

    def fetch() -> None:
        path = cache.fetch(f"{site.url}/{info.path}", info.sha256, info.bytes)
        found.append(hashlib.sha256(path.read_bytes()).hexdigest())

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [info.sha256] * 8 and len(files(cache)) == 1
    assert site.requests[f"/{info.path}"] == 1  # threads of one process wait for each other
    # Processes do not, and need not: here is one that fetches while another has just put the same file there.
    other = ShardCache(cache.folder, retry=FAST)
    other._transfer(f"{site.url}/{info.path}", cache._place(f"{site.url}/{info.path}", info.sha256), info.sha256, None)
    fetch()
    assert len(files(cache)) == 1


def test_shards_are_fetched_ahead_of_their_lanes(site: Site, cache: ShardCache) -> None:
    stream = remote(site, cache)
    later = stream.order.locate(np.arange(4) + 256 * 4).shard
    stream.sequences(np.arange(4))
    infos = [stream.files[0].split.shards[shard] for shard in later]
    places = [cache._place(f"{site.url}/{info.path}", info.sha256) for info in infos]
    waited = threading.Event()
    while not all(path.exists() for path in places):
        waited.wait(0.01)  # the suite's own time limit ends this if it never happens


def test_worker_processes_read_remote_shards(site: Site, cache: ShardCache, folder: Path) -> None:
    local = Stream([str(folder)], raw_length=65, stride=64, seed=0, lanes=4)
    plan = Plan(8, 4, lanes=4)
    for info in Manifest.load(folder).split("train").shards:
        site.fail(f"/{info.path}", "drop inside")
    with Loader(remote(site, cache), plan, CAUSAL, workers=1) as loader, Loader(local, plan, CAUSAL) as here:
        for _ in range(20):
            one, other = next(loader), next(here)
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                assert (a["labels"] == b["labels"]).all()


def test_a_full_disk_is_said_at_once(site: Site, tmp_path: Path) -> None:
    if not Path("/dev/full").exists() or os.geteuid() != 0 and not os.access("/dev/full", os.W_OK):
        pytest.skip("needs /dev/full")
    cache = ShardCache(tmp_path / "cache", retry=FAST)
    calls = []

    def full() -> None:
        calls.append(1)
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(ShardError, match=r"cannot store what arrives: .*No space left.*free space"):
        cache.retry.run("http://x/y.tar", full)
    assert len(calls) == 1


def test_pipes_and_pickles_are_refused_unless_named(folder: Path, tmp_path: Path) -> None:
    pipe = f"pipe:cat {folder}"
    with pytest.raises(ConfigError, match=r"runs a command; allow it with data\.allow=\[pipe\]"):
        Stream([pipe], raw_length=65, stride=64, seed=0)
    cache = ShardCache(tmp_path / "cache", retry=FAST, allow=("pipe",))
    stream = Stream([pipe], raw_length=65, stride=64, seed=0, cache=cache, allow=("pipe",))
    local = Stream([str(folder)], raw_length=65, stride=64, seed=0)
    assert (stream.sequences(np.arange(9)).tokens == local.sequences(np.arange(9)).tokens).all()
    assert read_bytes(f"pipe:cat {folder}/manifest.json", allow=("pipe",)) == (folder / "manifest.json").read_bytes()
    with pytest.raises(ShardError, match="the command ended with code 1"):
        read_bytes("pipe:false", allow=("pipe",), retry=FAST)
    with pytest.raises(ConfigError, match=r"x\.tar: member 'a\.pkl' is a pickle.*data\.allow=\[pickle\]"):
        check_member("a.pkl", "x.tar")
    check_member("a.pkl", "x.tar", ("pickle",))
    check_member("a.tokens", "x.tar")


def test_names_join_only_below_their_root() -> None:
    assert join("s3://bucket/a", "train/000/00000.tar") == "s3://bucket/a/train/000/00000.tar"
    for name in ("../x", "/x", "a/../../x", "http://x", "pipe:x", "a b", "$(x)", "", "a//b"):
        with pytest.raises(ShardError, match="outside its folder"):
            join("root", name)


def test_retries_back_off_and_stop(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def work() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("reset")
        return 7

    assert Retry(attempts=3, base_s=0.001).run("x", work) == 7
    with pytest.raises(ShardError, match="x: 2 attempts failed, the last with: ValueError: odd"):
        Retry(attempts=2, base_s=0.001).run("x", lambda: (_ for _ in ()).throw(ValueError("odd")))
