"""The run folder as each rank finds it: the one of rank 0, or the start ends with the reason."""

from pathlib import Path

import pytest

from shardwright.config import RunError
from shardwright.train.folder import CONFIG, find_run_folder


def test_a_folder_that_is_not_that_of_rank_0_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first save would find it, after all the steps before."""
    with pytest.raises(RunError, match="is not the run folder of rank 0; choose one that all hosts share"):
        find_run_folder(tmp_path, patience_s=0.0)
    (tmp_path / CONFIG).touch()
    find_run_folder(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere but where the disk may not
    with pytest.raises(RunError, match="cannot be written"):
        find_run_folder(tmp_path)
