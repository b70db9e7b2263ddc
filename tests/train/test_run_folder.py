"""The run folder as each rank finds it: the one of rank 0, and nobody else's, or the start ends with the reason."""

import os
from pathlib import Path

import pytest

from shardwright.config import ConfigError, RunError
from shardwright.train.folder import CONFIG, FolderLock, find_run_folder


def test_a_folder_that_is_not_that_of_rank_0_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first save would find it, after all the steps before."""
    with pytest.raises(RunError, match="is not the run folder of rank 0; choose one that all hosts share"):
        find_run_folder(tmp_path, patience_s=0.0)
    (tmp_path / CONFIG).touch()
    find_run_folder(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere but where the disk may not
    with pytest.raises(RunError, match="cannot be written"):
        find_run_folder(tmp_path)


def test_a_folder_in_which_a_process_trains_is_a_mistake(tmp_path: Path) -> None:
    """Exit code 2, at which no launcher starts the run again."""
    with FolderLock() as first, FolderLock() as second:
        first.take(tmp_path)
        with pytest.raises(ConfigError, match=f"{tmp_path}: process {os.getpid()} trains in it; wait for it or stop"):
            second.take(tmp_path)
        first.release()
        second.take(tmp_path)
