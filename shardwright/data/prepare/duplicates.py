"""The duplicates of a corpus, found by tasks that each hold a bounded part of it; the second pass of `prepare`.

The result is that of going through all documents in input order and keeping each that is like none of those kept,
whatever the partitions and whoever runs the tasks.

- Equal texts: fingerprints go to partitions by their value, and a partition finds what repeats in it.
- Near-duplicates: keys of the signatures' bands go to partitions by their value, and a partition links documents that
  share one. Linked documents form families. Nothing outside its family decides about a document, so families are
  gathered into bins of some thousand documents, and a bin is gone through in input order by `dedup.near_duplicates`. A
  family that is larger than a bin is cut into blocks: each in its turn is gone through, and what stays of it removes
  its like from all the blocks behind it.

A task holds a group of units, a partition or two blocks, at most some 300 MiB, and there are more of them where the
corpus is larger. The preparing process alone knows of every document: one byte, and some 50 while it forms families.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from shardwright.data.prepare import dedup
from shardwright.data.prepare.families import Blocks, Families, assign_bins
from shardwright.data.prepare.options import DedupOptions, PrepareConfig
from shardwright.data.prepare.pool import Pool
from shardwright.data.prepare.shuffle import gather, scatter
from shardwright.data.prepare.units import Job, read_config, read_part
from shardwright.log import Bar

FOLDER = "duplicates"
EXACT, NEAR = 1, 2
GROUP_BYTES = 32 << 20  # of signatures and keys that a task reads at once
PARTITION_ROWS = 1 << 20  # keys that a task sorts
BIN_DOCUMENTS = 1 << 14  # documents that a task compares; one that is kept takes about 4 KB there


class OpenBar(Protocol):
    """Shows progress: `bar(total, unit, description)`."""

    def __call__(self, total: float | None, unit: str, description: str) -> AbstractContextManager[Bar]: ...


class Group(NamedTuple):
    """Neighbouring units that one task reads, and the number of their first document in the corpus."""

    number: int
    units: list[int]
    first: int
    documents: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """The group's part of an array over all documents."""
        return values[self.first : self.first + self.documents]

    def arrays(self, job: Job, name: str) -> np.ndarray:
        """One array of all its units."""
        return np.concatenate([read_part(job.part("clean", unit), (name,))[0][name] for unit in self.units])


def find_duplicates(
    pool: Pool, job: Job, documents: Sequence[tuple[int, int]], config: PrepareConfig, show: OpenBar
) -> np.ndarray:
    """uint8 [documents] in input order: 0 stays, EXACT or NEAR. `documents` gives number and count of each unit."""
    removed = np.zeros(sum(count for _, count in documents), np.uint8)
    search = _Search(pool, job, list(_groups(documents, config.dedup)), config.dedup)
    if config.dedup.exact:
        with show(search.num_exact_tasks, "parts", "duplicates") as bar:
            for numbers in search.equal_texts():
                removed[numbers] = EXACT
                bar.advance()
    if config.dedup.near:
        with show(search.num_near_tasks, "parts", "near-duplicates") as bar:
            search.remove_near(removed, bar)
    return removed


def forget(work: Path) -> None:
    """Delete the files of this pass, whose result is all that is needed of it."""
    shutil.rmtree(work / FOLDER, ignore_errors=True)


def _groups(documents: Sequence[tuple[int, int]], options: DedupOptions) -> Iterator[Group]:
    """Neighbouring units, as many as make GROUP_BYTES; one alone may make more."""
    size = 16 + (4 * options.permutations + 16 * dedup.num_bands(options) if options.near else 0)
    group = Group(0, [], 0, 0)
    for unit, count in documents:
        if group.documents and (group.documents + count) * size > GROUP_BYTES:
            yield group
            group = Group(group.number + 1, [], group.first + group.documents, 0)
        group = group._replace(units=[*group.units, unit], documents=group.documents + count)
    if group.documents:
        yield group


class _Search:
    """The tasks of one search, in their order."""

    def __init__(self, pool: Pool, job: Job, groups: list[Group], options: DedupOptions) -> None:
        self.pool, self.job, self.groups, self.options = pool, job, groups, options
        self._num_documents = sum(group.documents for group in groups)
        self._exact_partitions = -(-self._num_documents // PARTITION_ROWS)
        self._band_partitions = 0
        if options.near:
            self._band_partitions = -(-self._num_documents * dedup.num_bands(options) // PARTITION_ROWS)

    @property
    def num_exact_tasks(self) -> int:
        """Tasks of `equal_texts`."""
        return len(self.groups) + self._exact_partitions

    @property
    def num_near_tasks(self) -> int:
        """Tasks of `remove_near` that are known beforehand."""
        return 2 * len(self.groups) + self._band_partitions

    def equal_texts(self) -> Iterator[np.ndarray]:
        """Numbers of documents whose text stood earlier, task by task."""
        yield from self.pool(scatter_fingerprints, ((g, self._exact_partitions, self.job) for g in self.groups))
        paths = len(self.groups)
        yield from self.pool(find_equal, ((p, paths, self.job) for p in range(self._exact_partitions)))

    def remove_near(self, removed: np.ndarray, bar: Bar) -> None:
        """Mark near-duplicates among the documents that `removed` leaves."""
        bins, num_whole, larger = assign_bins(self._families(removed, bar).roots(), BIN_DOCUMENTS)
        for _ in self.pool(scatter_signatures, ((g, g.of(bins), self.job) for g in self.groups)):
            bar.advance()
        whole = ((number, None, len(self.groups), self.job) for number in range(num_whole))
        for numbers in self.pool(find_near, whole):
            removed[numbers] = NEAR
        for blocks in larger:
            self._go_through(blocks, removed)

    def _families(self, removed: np.ndarray, bar: Bar) -> Families:
        """Documents that are candidates of each other, over however many others, in one family."""
        families = Families(len(removed))
        scatter_tasks = ((g, g.of(removed) > 0, self._band_partitions, self.job) for g in self.groups)
        link_tasks = ((number, len(self.groups), self.job) for number in range(self._band_partitions))
        for function, tasks in ((scatter_bands, scatter_tasks), (find_links, link_tasks)):
            for links in self.pool(function, tasks):
                families.unite(links)
                bar.advance()
        return families

    def _go_through(self, blocks: Blocks, removed: np.ndarray) -> None:
        """A family larger than a bin, block by block."""
        count = len(self.groups)
        for number, members in blocks.items():
            for numbers in self.pool(find_near, [(number, removed[members] > 0, count, self.job)]):
                removed[numbers] = NEAR
            stays = removed[members] == 0
            later = (
                (other, removed[others] > 0, number, stays, count, self.job)
                for other, others in blocks.items()
                if other > number
            )
            for numbers in self.pool(find_like, later):
                removed[numbers] = NEAR


# --- tasks ----------------------------------------------------------------------------------------------------------


def scatter_fingerprints(group: Group, partitions: int, job: Job) -> np.ndarray:
    """Send the fingerprints of a group to their partitions; returns documents that repeat inside the group.

    Only the first of equal ones is sent, so that a text which is everywhere does not fill a partition.
    """
    path = _file(job, "fingerprints", group.number)
    if not path.exists():
        prints = group.arrays(job, "fingerprints")
        repeated = dedup.exact_duplicates(prints)
        rows = {"fingerprints": prints[~repeated], "numbers": group.first + np.flatnonzero(~repeated)}
        partition = (prints[~repeated, 0] % np.uint64(partitions)).astype(np.int64)
        scatter(path, partition, rows, {"repeated": group.first + np.flatnonzero(repeated)})
    return read_part(path, ("repeated",))[0]["repeated"]


def find_equal(partition: int, groups: int, job: Job) -> np.ndarray:
    """Documents whose fingerprint stood earlier in their partition."""
    rows = gather(_files(job, "fingerprints", groups), partition, ("fingerprints", "numbers"))
    return rows["numbers"][dedup.exact_duplicates(rows["fingerprints"])]


def scatter_bands(group: Group, removed: np.ndarray, partitions: int, job: Job) -> np.ndarray:
    """Send the band keys of a group's documents to their partitions; returns links inside the group, int64 [links, 2].

    Only the first of equal keys is sent, since the others are linked to it.
    """
    path = _file(job, "bands", group.number)
    if not path.exists():
        signatures = group.arrays(job, "signatures")
        (stays,) = np.nonzero(~removed & ~dedup.is_blank(signatures))
        keys = dedup.band_keys(signatures[stays], read_config(job.config).dedup)
        del signatures
        found = [_first_and_links(column, group.first + stays) for column in keys.T]
        rows = {name: np.concatenate([rows[name] for rows, _ in found]) for name in ("keys", "numbers")}
        partition = (rows["keys"] % np.uint64(max(partitions, 1))).astype(np.int64)
        scatter(path, partition, rows, {"links": np.unique(np.concatenate([links for _, links in found]), axis=0)})
    return read_part(path, ("links",))[0]["links"]


def find_links(partition: int, groups: int, job: Job) -> np.ndarray:
    """Links between documents that share a key of this partition, int64 [links, 2]."""
    rows = gather(_files(job, "bands", groups), partition, ("keys", "numbers"))
    _, links = _first_and_links(rows["keys"], rows["numbers"])
    return np.unique(links, axis=0)


def _first_and_links(keys: np.ndarray, numbers: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One row for each key, and links from its document to the others that have the key."""
    found, first, which = np.unique(keys, return_index=True, return_inverse=True)
    links = np.stack([numbers[first][which], numbers], axis=1)
    return {"keys": found, "numbers": numbers[first]}, links[links[:, 0] != links[:, 1]]


def scatter_signatures(group: Group, bins: np.ndarray, job: Job) -> None:
    """Send the signatures of a group's documents to their bins (int64 [documents], -1 for none)."""
    path = _file(job, "signatures", group.number)
    if not path.exists():
        (wanted,) = np.nonzero(bins >= 0)
        rows = {"signatures": group.arrays(job, "signatures")[wanted], "numbers": group.first + wanted}
        scatter(path, bins[wanted], rows, {})


def find_near(number: int, gone: np.ndarray | None, groups: int, job: Job) -> np.ndarray:
    """Near-duplicates inside a bin; `gone` (bool [documents of the bin]) are out already."""
    rows = gather(_files(job, "signatures", groups), number, ("signatures", "numbers"))
    config, count = read_config(job.config), len(rows["numbers"])
    values = (None if gone is not None and gone[n] else rows["signatures"][n] for n in range(count))
    return rows["numbers"][dedup.near_duplicates(values, count, config.dedup, config.seed)]


def find_like(number: int, gone: np.ndarray, earlier: int, stays: np.ndarray, groups: int, job: Job) -> np.ndarray:
    """Documents of a block that are like one of those that stay (bool [documents]) of an earlier block."""
    config = read_config(job.config)
    kept = dedup.Kept(config.dedup, config.seed)
    for values in gather(_files(job, "signatures", groups), earlier, ("signatures",))["signatures"][stays]:
        kept.add(values)
    rows = gather(_files(job, "signatures", groups), number, ("signatures", "numbers"))
    like = [not gone[n] and kept.has_like(values) for n, values in enumerate(rows["signatures"])]
    return rows["numbers"][np.array(like, bool)]


def _file(job: Job, kind: str, number: int) -> Path:
    return Path(job.work) / FOLDER / kind / f"{number // 1000:04d}" / f"{number:07d}.rows"


def _files(job: Job, kind: str, count: int) -> Iterator[Path]:
    return (_file(job, kind, number) for number in range(count))
