"""Rows of arrays sent from many files to many partitions, so that no process ever holds more than one of either.

Part of `prepare`, under `duplicates`. A task writes one file with its rows sorted by partition; the task of a partition
then reads its slice of each of these files. What a partition holds, and in which order, does not depend on who wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shardwright.data.prepare.units import write_part


def scatter(path: Path, partition: np.ndarray, rows: dict[str, np.ndarray], beside: dict[str, np.ndarray]) -> None:
    """Write `rows` (arrays of as many rows as `partition`), sorted by partition, in their order within each.

    `beside` holds arrays for whoever reads the whole file.
    """
    order = np.argsort(partition, kind="stable")
    present, starts = np.unique(partition[order], return_index=True)
    places = {"_present": present.astype(np.int64), "_starts": np.append(starts, len(order)).astype(np.int64)}
    write_part(path, {name: values[order] for name, values in rows.items()} | beside | places, None)


def gather(paths: Iterable[Path], partition: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The rows of one partition from all files, in the order of the files."""
    slices = [_slice(path, partition, names) for path in paths]
    return {name: np.concatenate([found[name] for found in slices]) for name in names}


def _slice(path: Path, partition: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        present, starts = file.get_tensor("_present"), file.get_tensor("_starts")
        place = int(np.searchsorted(present, partition))
        found = place < len(present) and present[place] == partition
        start, stop = (int(starts[place]), int(starts[place + 1])) if found else (0, 0)
        if not len(present):  # of an array without rows the library gives no slice
            return {name: file.get_tensor(name) for name in names}
        return {name: file.get_slice(name)[start:stop] for name in names}
