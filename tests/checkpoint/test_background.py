"""Saving while training goes on: what is saved is what was there at the call, and errors are not lost."""

import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from shardwright.checkpoint import CheckpointError, CheckpointWriter, SaveError, find_newest, load, read_manifest


def model() -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.randn(200, 300) for i in range(8)}


def test_a_save_holds_the_values_of_its_call(tmp_path: Path) -> None:
    tensors, wanted = model(), {}
    with CheckpointWriter(tmp_path) as writer:
        for step in range(1, 5):
            wanted[step] = {name: tensor.clone() for name, tensor in tensors.items()}
            state = {"step": step, "list": [step]}
            writer.save(tensors, state, step=step)
            state["list"].append("later")  # type: ignore[attr-defined]
            for tensor in tensors.values():
                tensor.normal_()  # training goes on while the thread writes
    for step, values in wanted.items():
        fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        assert load(tmp_path / f"step_{step:08}", fresh) == {"step": step, "list": [step]}
        assert all(torch.equal(fresh[name], value) for name, value in values.items())


def test_the_writing_is_done_by_another_thread_one_save_at_a_time(tmp_path: Path) -> None:
    before = threading.active_count()
    with CheckpointWriter(tmp_path) as writer:
        for step in range(3):
            writer.save(model(), {}, step=step)
            assert threading.active_count() <= before + 1
        assert writer.wait() == tmp_path / "step_00000002"
        assert not writer.is_saving and threading.active_count() == before
    assert [read_manifest(tmp_path / f"step_{step:08}").serial for step in range(3)] == [1, 2, 3]


def test_buffers_are_reused_and_follow_changes(tmp_path: Path) -> None:
    tensors = model()
    with CheckpointWriter(tmp_path) as writer:
        writer.save(tensors, {}, step=1)
        writer.wait()
        held = {name: buffer.data_ptr() for name, buffer in writer._buffers._held.items()}  # type: ignore[union-attr]
        tensors["w0"] = torch.randn(3)
        del tensors["w1"]
        writer.save(tensors, {}, step=2)
        now = {name: buffer.data_ptr() for name, buffer in writer._buffers._held.items()}  # type: ignore[union-attr]
        assert "w1" not in now and all(now[name] == held[name] for name in tensors if name != "w0")
    fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(tmp_path / "step_00000002", fresh)
    assert torch.equal(fresh["w0"], tensors["w0"])


def test_synchronous_saving_writes_before_it_returns(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, asynchronous=False, keep_last=1) as writer:
        for step in (1, 2):
            writer.save(model(), {}, step=step)
            assert find_newest(tmp_path, deep=True)[0] == tmp_path / f"step_{step:08}"
    assert not (tmp_path / "step_00000001").exists()


@pytest.fixture
def quota() -> object:
    """Files of this process may not grow beyond 100 kB until the returned function is called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # noqa: E731
    yield lift
    lift()


def test_an_error_surfaces_at_the_next_call_once_and_the_run_can_go_on(tmp_path: Path, quota: object) -> None:
    with CheckpointWriter(tmp_path) as writer:
        writer.save({"w": torch.zeros(2)}, {}, step=1)
        writer.save(model(), {}, step=2)  # returns: it is the thread that fails
        with pytest.raises(SaveError, match="step 2 was not saved .*no space left") as caught:
            writer.save(model(), {}, step=3)
        assert "\n" not in str(caught.value)
        assert find_newest(tmp_path, deep=True) == (tmp_path / "step_00000001", [])
        quota()  # type: ignore[operator]
        writer.save(model(), {}, step=4)
        assert writer.wait() == tmp_path / "step_00000004"
    assert find_newest(tmp_path, deep=True) == (tmp_path / "step_00000004", [])


def test_a_look_between_saves_finds_the_error_once_and_waits_for_nothing(tmp_path: Path, quota: object) -> None:
    with CheckpointWriter(tmp_path) as writer:
        writer.check()
        writer.save(model(), {}, step=1)
        deadline = time.monotonic() + 60
        with pytest.raises(SaveError, match="step 1 was not saved .*no space left"):
            while time.monotonic() < deadline:
                writer.check()
        writer.check()
        quota()  # type: ignore[operator]
        writer.save(model(), {}, step=2)
        assert writer.wait() == tmp_path / "step_00000002"


def test_an_error_surfaces_at_close(tmp_path: Path, quota: object) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(model(), {}, step=1)
    with pytest.raises(SaveError, match="step 1 was not saved"):
        writer.close()
    writer.close()  # once is enough
    with pytest.raises(ValueError, match="step 2 cannot be saved: this CheckpointWriter is closed"):
        writer.save(model(), {}, step=2)


def test_what_ended_the_block_is_not_hidden_by_a_failed_save(tmp_path: Path, quota: object) -> None:
    with pytest.raises(KeyError, match="training"), CheckpointWriter(tmp_path) as writer:
        writer.save(model(), {}, step=1)
        raise KeyError("training")


def test_leaving_early_still_finishes_the_save(tmp_path: Path) -> None:
    with pytest.raises(KeyError), CheckpointWriter(tmp_path) as writer:
        writer.save(model(), {}, step=1)
        raise KeyError
    assert find_newest(tmp_path, deep=True)[0] == tmp_path / "step_00000001"


def test_bad_input_is_refused_at_the_call_itself(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer, pytest.raises(ValueError, match="state.when is a"):
        writer.save(model(), {"when": {1}}, step=1)


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file")
