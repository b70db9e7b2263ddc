"""The shards of one split of one prepared folder: opened when first wanted, from this disk or through the cache.

Between `shards` and `remote` below and `stream` above.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from shardwright.data.manifest import Manifest, ShardError, ShardInfo
from shardwright.data.remote import ShardCache, Wanted, is_remote, join
from shardwright.data.shards import Shard

_SHARDS_OPEN = 1024
_FETCHES_AT_ONCE = 8
_ASKED_KEPT = 4096


class ShardFiles:
    """The shards of one split of one prepared folder, opened when first wanted, local or through the cache."""

    def __init__(self, path: str, split: str, cache: ShardCache | None = None, allow: Collection[str] = ()) -> None:
        self.manifest = Manifest.load(path, allow)
        self.split = self.manifest.split(split)
        self.sizes = [shard.tokens for shard in self.split.shards]
        self._root = self.manifest.root
        self._cache = (cache or ShardCache(allow=tuple(allow))) if is_remote(self._root) else None
        self.open: dict[int, Shard] = {}
        self._dropped: set[str] = set()
        self._ahead: _Ahead | None = None

    @property
    def remote(self) -> bool:
        """Whether shards come over the network."""
        return self._cache is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": {}, "_ahead": None}

    def shard(self, number: int) -> Shard:
        """Shard `number` of the manifest; ShardError where it is missing, truncated or another tokenizer's."""
        found = self.open.get(number)
        if found is None:
            found = self._opened(self.split.shards[number])
            self.open[number] = found
            self._close_oldest()
        return found

    def _close_oldest(self) -> None:
        """Keep the open shards few, and below the cache's bound: a mapped file fills the disk, evicted or not."""
        most = self._cache.max_bytes if self._cache else None
        for number in list(self.open)[:-1]:
            held = sum(self.split.shards[n].bytes for n in self.open) if most is not None else 0
            if len(self.open) <= _SHARDS_OPEN and (most is None or held <= most):
                return
            self.open.pop(number, None)

    def drop_bad(self, error: ShardError) -> bool:
        """Forget the copy in the cache that an error is about, to be fetched once more; False if it is not of these."""
        for number, shard in list(self.open.items()):
            if self._cache is not None and error.path == shard.path and error.path not in self._dropped:
                self._dropped.add(shard.path)
                self._cache.forget(shard.path)
                self._cache.forget(shard.index_path)
                del self.open[number]
                return True
        return False

    def fetch(self, numbers: Collection[int]) -> None:
        """Open these shards, those that must come over the network side by side."""
        missing = [number for number in numbers if number not in self.open]
        if self._cache is None or len(missing) < 2:
            return
        with ThreadPoolExecutor(min(_FETCHES_AT_ONCE, len(missing))) as pool:
            list(pool.map(self.shard, missing))

    def fetch_ahead(self, numbers: Collection[int]) -> None:
        """Bring these shards into the cache in the background; an error waits for the reader who wants them."""
        if self._cache is None:
            return
        self._ahead = self._ahead or _Ahead()
        for number in numbers:
            if number not in self.open:
                tar, index = _wanted(self._root, self.split.shards[number])
                self._ahead.ask(self._cache, tar, index)

    def _opened(self, info: ShardInfo) -> Shard:
        tar, index = _wanted(self._root, info)
        shard = self._fetched(self._cache, tar, index) if self._cache else Shard(tar[0], index[0], info.index_sha256)
        if shard.facts["tokenizer_sha256"] != self.manifest.tokenizer["sha256"] or shard.num_tokens != info.tokens:
            raise ShardError(
                f"{tar[0]}: of another tokenizer or length than its manifest says; run `shardwright prepare` again"
            )
        return shard

    @staticmethod
    def _fetched(cache: ShardCache, tar: Wanted, index: Wanted) -> Shard:
        for last in (False, False, True):
            with cache.holding(tar, index) as local:
                try:
                    return Shard(local[0], local[1], index[1])
                except ShardError:  # evicted by another process before it was open, or gone bad on this disk
                    if last:
                        raise
                    if all(map(os.path.exists, local)):
                        for path in local:
                            cache.forget(path)
        raise AssertionError("unreachable")


class _Ahead:
    """Fetches on one background thread, which no end of the program waits for."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._queue: SimpleQueue[tuple[ShardCache, Wanted, Wanted]] = SimpleQueue()
        threading.Thread(target=self._run, name="shardwright-fetch", daemon=True).start()

    def ask(self, cache: ShardCache, tar: Wanted, index: Wanted) -> None:
        if tar[0] in self._asked:
            return
        if len(self._asked) >= _ASKED_KEPT:
            self._asked.clear()  # so that a later epoch may ask again
        self._asked.add(tar[0])
        self._queue.put((cache, tar, index))

    def _run(self) -> None:
        while True:
            cache, tar, index = self._queue.get()
            with suppress(Exception):
                cache.fetch(*tar)
                cache.fetch(*index)


def _wanted(root: str, info: ShardInfo) -> tuple[Wanted, Wanted]:
    """(place, sha256, size) of a shard's tar and of its index."""
    return (join(root, info.path), info.sha256, info.bytes), (join(root, info.index), info.index_sha256, None)
