"""The folder of checkpoints: names, which one is newest, the `latest` pointer, publishing, what to keep.

Above integrity.py, below saving. Names in the folder:

    step_00000100              a published checkpoint
    replaced_step_00000100     the older one of that step, while a newer one takes its place: readable until then
    unfinished_step_00000100   a save that is going on, or was interrupted; the next save removes it
    removed_step_00000090      one that is being deleted; the next save removes what is left
    latest                     text: the name of the newest one; moved last

Every change of a name is one rename, so that a kill at any moment leaves whole checkpoints or folders that are plainly
not checkpoints. Newest is by serial (each save takes the next number), not by step: after a roll-back, or a resume from
an older step, the checkpoint written last is the one to go on from.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from functools import partial
from pathlib import Path

from shardwright.checkpoint.integrity import (
    CheckpointError,
    DamagedError,
    SaveError,
    damage,
    missing_file,
    read_manifest,
    read_marker,
)
from shardwright.checkpoint.ranks import open_ranks
from shardwright.log import get_logger

LATEST = "latest"
UNFINISHED, REPLACED, REMOVED = "unfinished_", "replaced_", "removed_"
CANDIDATE = re.compile(rf"({REPLACED})?step_(\d+)")
Skipped = list[tuple[Path, str]]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def step_name(step: int) -> str:
    """Name of a step's checkpoint folder."""
    return f"step_{step:08}"


def find_newest(folder: str | Path, *, deep: bool = False) -> tuple[Path | None, Skipped]:
    """The newest whole checkpoint in a folder of checkpoints, and what was passed over: (path, reason in one line).

    Whole means: the marker is there, it matches the manifest, and every file has its size. With `deep`, every byte is
    read and checked too. (None, ...) where nothing can be used. Reads names and JSON; changes nothing. Under several
    processes call it on one and share the answer (see `agree_on_newest`).
    """
    folder = Path(folder)
    found, skipped = _survey(folder)
    for _, _, path in found:
        reason = why_not_whole(path, deep=deep)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped


def _survey(folder: Path) -> tuple[list[tuple[int, int, Path]], Skipped]:
    """Checkpoints by their markers alone, newest first, as (serial, step, path); and what has no readable marker."""
    found: list[tuple[int, int, Path]] = []
    skipped: Skipped = []
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:
        if path.name.startswith(UNFINISHED):
            skipped.append((path, "a save that was interrupted, or goes on"))
        elif CANDIDATE.fullmatch(path.name):
            try:
                marker = read_marker(path)
                found.append((marker["serial"], marker["step"], path))
            except DamagedError as error:
                skipped.append((path, str(error)))
    return sorted(found, reverse=True), skipped


def agree_on_newest(folder: str | Path, *, deep: bool = False) -> tuple[Path | None, Skipped]:
    """`find_newest` by rank 0, told to every rank; every rank has to call it. Alone it is `find_newest`."""
    with open_ranks() as ranks:
        look = partial(find_newest, folder, deep=deep)
        found = ranks.together("looking for checkpoints", look if ranks.rank == 0 else None)
        path, skipped = found if found is not None else (None, [])
        lines = ranks.share("\n".join([str(path or ""), *(f"{p}\t{reason}" for p, reason in skipped)])).split("\n")
    pairs = [line.split("\t", 1) for line in lines[1:]]
    return (Path(lines[0]) if lines[0] else None), [(Path(name), reason) for name, reason in pairs]


def why_not_whole(checkpoint: Path, *, deep: bool = False) -> str | None:
    """Why a checkpoint folder cannot be used, in one line; None where it can."""
    try:
        problem = missing_file(checkpoint, read_manifest(checkpoint))
    except CheckpointError as error:
        return str(error)
    if problem is None and deep:
        problem = next(damage(checkpoint), None)
    return problem


def read_latest(folder: str | Path) -> Path | None:
    """The checkpoint that `latest` names; None where there is none or it is not whole. To resume, use `find_newest`."""
    try:
        path = Path(folder) / (Path(folder) / LATEST).read_text().strip()
    except (OSError, ValueError):
        return None
    return path if CANDIDATE.fullmatch(path.name) and why_not_whole(path) is None else None


def write_latest(folder: Path, name: str) -> None:
    """Point `latest` at a checkpoint, in one rename."""
    new = folder / f"{LATEST}.new"
    write_synced(new, f"{name}\n".encode())
    new.rename(folder / LATEST)
    sync_folder(folder)


def next_serial(folder: Path) -> int:
    """One more than any save into this folder has had."""
    return max((serial for serial, _, _ in _survey(folder)[0]), default=0) + 1


def build_folder(folder: Path) -> None:
    """Make the folder of checkpoints; `CheckpointError` where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{LATEST}.new"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(explain(error, folder, f"checkpoints cannot be written to {folder}")) from error


def apply_cleaning(folder: Path) -> None:
    """Remove what interrupted saves and removals left, and give a checkpoint back the name that one of them took."""
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        if path.name.startswith((UNFINISHED, REMOVED)):
            get_logger().info("checkpoint: removing %s, left by an interrupted save", path.name)
            remove(path)
        elif path.name.startswith(REPLACED) and CANDIDATE.fullmatch(path.name):
            final = folder / path.name.removeprefix(REPLACED)
            if not final.exists():
                path.rename(final)
            elif why_not_whole(final) is None:
                remove(path)


def apply_publishing(unfinished: Path, name: str) -> Path:
    """Give a finished folder its name; one that has it already stays readable until then. Returns the new path."""
    folder, final = unfinished.parent, unfinished.parent / name
    replaced = folder / f"{REPLACED}{name}"
    if final.exists() and why_not_whole(final) is not None:
        remove(final)
    if final.exists():
        if replaced.exists():
            remove(replaced)  # `final` took its place, and the end of that was interrupted
        (folder / LATEST).unlink(missing_ok=True)  # for the moment in which `final` does not exist
        final.rename(replaced)
    unfinished.rename(final)
    sync_folder(folder)
    write_latest(folder, name)
    if replaced.exists():
        remove(replaced)
    return final


def apply_retention(folder: Path, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Delete old checkpoints: all but the newest `keep_last` whole ones and those of steps that `keep_every` divides.

    `keep_last=None` keeps all. One that is not whole is neither counted nor touched: a person may want to look at it.
    Returns the names that went.
    """
    whole, gone = 0, []
    for _, step, path in _survey(folder)[0] if keep_last is not None else []:
        if whole < max(keep_last or 0, 1):
            whole += why_not_whole(path) is None
        elif not (keep_every and step % keep_every == 0):
            remove(path)
            gone.append(path.name)
    return gone


def discard_newer(folder: str | Path, step: int) -> list[str]:
    """After a roll-back to `step`: drop the checkpoints of later steps, `latest` first. Call on one process, with no
    save in flight. `CheckpointError` where `step` itself has no whole checkpoint. Returns the names that went."""
    folder = Path(folder)
    target = folder / step_name(step)
    reason = why_not_whole(target)
    if reason is not None:
        raise CheckpointError(f"cannot roll back to step {step}: {reason}")
    write_latest(folder, target.name)
    matches = [(match, path) for path in folder.iterdir() if (match := CANDIDATE.fullmatch(path.name))]
    later = sorted(((int(m[2]), path) for m, path in matches if int(m[2]) > step), reverse=True)
    for _, path in later:
        remove(path)
    return [path.name for _, path in later]


def remove(path: Path) -> None:
    """Delete a folder; it loses its name first, so that half of it is never taken for a checkpoint."""
    if not path.name.startswith((REMOVED, UNFINISHED)):
        doomed = path.parent / f"{REMOVED}{path.name}"
        if doomed.exists():
            shutil.rmtree(doomed)
        path = path.rename(doomed)
    shutil.rmtree(path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file through to the disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain(error: OSError, folder: Path, what: str) -> str:
    """`what` failed for a reason of the file system, in one line with a remedy."""
    if error.errno in FULL:
        free = _free(folder)
        return f"{what}: no space left ({free}); free some space, or lower checkpoint.keep_last"
    if error.errno in FORBIDDEN:
        return f"{what}: no write permission; give it, or choose another folder"
    return f"{what}: {error.strerror or error}"


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free on that device or quota"
    except OSError:
        return "of what the device or a quota allows"


def save_error(error: Exception, folder: Path, step: int) -> SaveError:
    """Why a save failed, in one line that says what still stands."""
    what = f"step {step} was not saved to {folder}"
    text = explain(error, folder, what) if isinstance(error, OSError) else f"{what}: {error}"
    return SaveError(f"{text} (earlier checkpoints are untouched)")
