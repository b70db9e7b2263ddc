"""Which checkpoint is newest, what is passed over and why, what is kept, and what interrupted saves leave."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.checkpoint import (
    CheckpointError,
    agree_on_newest,
    discard_newer,
    find_newest,
    load,
    read_latest,
    save,
    step_name,
)


def save_step(folder: Path, step: int, **options: int) -> Path:
    return save(folder, {"w": torch.full((4,), float(step))}, {"step": step}, step=step, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_absent_or_empty_folder_has_none(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "absent") == (None, [])
    assert find_newest(tmp_path) == (None, [])
    assert read_latest(tmp_path) is None
    assert agree_on_newest(tmp_path) == (None, [])


def test_the_newest_whole_one_is_found_and_what_was_skipped_is_said(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save_step(tmp_path, step)
    (tmp_path / "step_00000060/complete.json").unlink()
    (tmp_path / "step_00000050/tensors/000/rank_00000.safetensors").unlink()
    (tmp_path / "step_00000040/tensors/000/rank_00000.json").write_text("{}")
    with open(tmp_path / "step_00000030/manifest.json", "a") as manifest:
        manifest.write(" ")
    shutil.copytree(tmp_path / "step_00000020", tmp_path / "unfinished_step_00000070")
    (tmp_path / "notes").mkdir()
    path, skipped = find_newest(tmp_path)
    assert path == tmp_path / "step_00000020"
    reasons = {path.name: reason for path, reason in skipped}
    assert reasons.pop("unfinished_step_00000070") == "a save that was interrupted, or goes on"
    assert "complete.json, written last, is missing" in reasons.pop("step_00000060")
    assert reasons.pop("step_00000050") == "tensors/000/rank_00000.safetensors is missing"
    assert "rank_00000.json has 2 bytes of" in reasons.pop("step_00000040")
    assert "manifest.json is damaged" in reasons.pop("step_00000030")
    assert not reasons
    assert agree_on_newest(tmp_path) == (path, skipped)


def test_a_flipped_tensor_byte_is_seen_by_the_deep_look(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2) / "tensors/000/rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    assert find_newest(tmp_path)[0] == tmp_path / "step_00000002"
    found, ((skipped, reason),) = find_newest(tmp_path, deep=True)
    assert found == tmp_path / "step_00000001" and skipped.name == "step_00000002" and "tensor 'w'" in reason


def test_latest_is_never_trusted_blindly(tmp_path: Path) -> None:
    path = save_step(tmp_path, 5)
    assert read_latest(tmp_path) == path
    (path / "complete.json").unlink()
    assert read_latest(tmp_path) is None
    for name in ("../elsewhere", "", "step_00000009", "notes"):
        (tmp_path / "latest").write_text(name)
        assert read_latest(tmp_path) is None


def test_what_interrupted_saves_leave_is_removed_by_the_next_save(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    for name in ("unfinished_step_00000002", "removed_step_00000000", "replaced_step_00000001"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    (tmp_path / "mine").mkdir()
    save_step(tmp_path, 3)
    assert names(tmp_path) == ["latest", "mine", "step_00000001", "step_00000003"]


def test_killed_while_replacing_a_step_the_old_one_is_used(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    (tmp_path / "step_00000002").rename(tmp_path / "replaced_step_00000002")
    path, _ = find_newest(tmp_path)
    assert path == tmp_path / "replaced_step_00000002" and load(path, {"w": torch.zeros(4)}) == {"step": 2}
    save_step(tmp_path, 3)  # gives it its name back: it is the only one of its step
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    assert load(tmp_path / "step_00000002", {"w": torch.zeros(4)}) == {"step": 2}


def test_after_going_back_the_one_written_last_is_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    save_step(tmp_path, 15)  # resumed from 10 by the user's choice
    assert find_newest(tmp_path)[0] == tmp_path / "step_00000015" == read_latest(tmp_path)
    save_step(tmp_path, 20, keep_last=2)
    assert names(tmp_path) == ["latest", "step_00000015", "step_00000020"]


def test_a_roll_back_drops_later_steps(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    assert discard_newer(tmp_path, 10) == ["step_00000030", "step_00000020"]
    assert names(tmp_path) == ["latest", "step_00000010"]
    assert read_latest(tmp_path) == find_newest(tmp_path)[0] == tmp_path / "step_00000010"
    with pytest.raises(CheckpointError, match="cannot roll back to step 7"):
        discard_newer(tmp_path, 7)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True),
    st.integers(1, 4),
    st.none() | st.integers(1, 5),
)
def test_the_newest_n_and_the_multiples_stay(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int, every: int | None
) -> None:
    folder = tmp_path_factory.mktemp("run")
    for i, step in enumerate(steps):
        save(folder, {}, {}, step=step, keep_last=last, keep_every=every)
        kept = {s for j, s in enumerate(steps[: i + 1]) if j > i - last or (every and s % every == 0)}
        assert names(folder) == ["latest", *(step_name(s) for s in sorted(kept))]


def test_retention_neither_counts_nor_touches_what_is_not_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    (tmp_path / "step_00000003/manifest.json").write_text("{}")
    (tmp_path / "step_00000002/complete.json").write_text("{")
    save_step(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["latest", *(step_name(s) for s in (1, 2, 3, 4))]
    save_step(tmp_path, 5, keep_last=2)
    assert "step_00000001" not in names(tmp_path)


def test_a_marker_of_another_checkpoint_does_not_pass(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    shutil.copy(tmp_path / "step_00000001/complete.json", tmp_path / "step_00000002/complete.json")
    path, skipped = find_newest(tmp_path)
    assert path == tmp_path / "step_00000001" and "manifest.json is damaged" in skipped[0][1]
    assert json.loads((path / "complete.json").read_text())["serial"] == 1
