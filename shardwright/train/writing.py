"""What a file system refuses while a run writes into its folder, as one line with a remedy.

Below every module of train that writes a file.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwright.config import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def writing(path: Path, option: str = "run=PATH") -> Iterator[None]:
    """Within, an OSError becomes a RunError that names its file, else `path`, and the option that names another."""
    try:
        yield
    except OSError as error:
        raise RunError(explain(error, path, option)) from None


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Within, a full disk that no one named a file for becomes a RunError about the run folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        raise RunError(explain(error, folder)) from None


def explain(error: OSError, path: Path, option: str = "run=PATH") -> str:
    """One line: which file, what happened, what to do."""
    remedy = f"mend its permissions or choose another folder with {option}"
    if error.errno in FULL:
        remedy = "free space and start the same command again"
    elif error.errno in _IN_THE_WAY:
        remedy = f"move away what stands in its place, or choose another folder with {option}"
    return f"{error.filename or path}: cannot be written: {error.strerror or error}; {remedy}"
