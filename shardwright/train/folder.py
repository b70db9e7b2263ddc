"""The run folder: its config, its lock on meaning, the process that works in it, and where its parts lie."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from shardwright.checkpoint import find_newest, read_manifest
from shardwright.checkpoint.folder import UNFINISHED, Skipped
from shardwright.config import Config, ConfigError, RunError, differences, to_yaml
from shardwright.log import get_logger
from shardwright.train.metrics import METRICS
from shardwright.train.settings import read_config
from shardwright.train.writing import writing

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
PATIENCE_S = 60.0


def open_run_folder(config: Config) -> tuple[Path, Path | None]:
    """Make or enter the run folder; returns it and the newest whole checkpoint to go on from.

    ConfigError where the folder holds the run of another config; RunError where it cannot be written, or where the run
    has checkpoints and none of them is whole: it would begin again and overwrite what is left of itself.
    """
    folder = Path(config.run or "")
    checkpoint, skipped = find_newest(folder / CHECKPOINTS)
    for path, reason in skipped:
        get_logger().warning("checkpoint %s is passed over: %s", path, reason)
    if checkpoint is not None and "position" not in read_manifest(checkpoint).state:
        raise ConfigError(f"{folder}: holds an imported model, not a run; begin a run with begin={folder} run=PATH")
    begun = checkpoint is not None or bool(skipped) or (folder / METRICS).is_file()
    if begun and (folder / CONFIG).is_file():
        _check_meaning(folder, config)
    if checkpoint is None:
        _check_damage(skipped)
    write_config(folder, config)
    return folder, checkpoint


def write_config(folder: Path, config: Config) -> None:
    """Write the fully resolved config into the run folder, whole or not at all."""
    path = folder / CONFIG
    fresh = path.with_name(f".{CONFIG}.{os.getpid()}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_text(to_yaml(config), encoding="utf-8")
        fresh.replace(path)


def find_run_folder(folder: Path, patience_s: float = PATIENCE_S) -> None:
    """RunError where this rank does not see what rank 0 wrote at the start, or could not save: the first save is late.

    Network file systems may show a new file only after a while.
    """
    where, deadline = f"{folder} on {socket.gethostname()}", time.monotonic() + patience_s
    while not (folder / CONFIG).is_file():
        if time.monotonic() > deadline:
            raise RunError(f"{where}: is not the run folder of rank 0; choose one that all hosts share, with run=PATH")
        time.sleep(0.2)
    if not os.access(folder, os.W_OK):
        raise RunError(f"{where}: cannot be written; mend its permissions or choose another folder with run=PATH")


def _check_meaning(folder: Path, config: Config) -> None:
    changed = differences(read_config(folder / CONFIG), config)
    if changed:
        key, there, here = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{folder}: holds the run of another config: {key} is {there} there and {here} here{more}; "
            "start a new run with run=PATH, or go on with the settings it began with"
        )


def _check_damage(skipped: Skipped) -> None:
    damaged = [(path, reason) for path, reason in skipped if not path.name.startswith(UNFINISHED)]
    if damaged:
        path, reason = max(damaged)
        raise RunError(
            f"{path}: this run has no whole checkpoint to go on from ({reason}); "
            "restore it, or start a new run with run=PATH"
        )


class FolderLock:
    """Keeps a second process of this host out of a run folder; whoever holds it dies with its process.

    A help, not a need: where the file system has no locks, or another host holds one, the run goes on.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def take(self, folder: Path) -> None:
        """RunError where a live process of this host works in `folder`."""
        with suppress(OSError):  # a folder that cannot be written gets its own error
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if self._file is None:
            return
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._refuse(folder)
        except (ImportError, OSError):  # no such locks on this system, or file system
            return
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _refuse(self, folder: Path) -> None:
        assert self._file is not None
        time.sleep(0.2)  # it may be just about to say who it is
        pid, _, host = os.pread(self._file, 300, 0).decode(errors="replace").strip().partition(" ")
        if host == socket.gethostname() and pid.isdecimal() and _is_alive(int(pid)):
            raise RunError(f"{folder}: process {pid} trains in it; wait for it or stop it, or choose another run=PATH")
        get_logger().warning("%s: is locked by process %s on %s; going on, as it may be gone", folder, pid, host)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is someone else's
        return True
    return True
