"""A step that the guard stops the run for, or that raises, is kept whole; what is no failure of the step is not."""

import json
from pathlib import Path

import pytest
import torch

from shardwright.checkpoint import find_newest
from shardwright.config import ConfigError, RunError
from shardwright.train.capsule import Capsule, batch_path, module_of, read_batches, same_bits
from shardwright.train.run import Run, train


def poison(monkeypatch, name: str, at: int) -> None:
    """From step `at` on one element of this weight is NaN: what a broken memory does."""
    step = Run._one_step

    def spoilt(run: Run) -> None:
        if run.position.step == at - 1:
            run.step.masters.weights[name].view(-1)[0] = torch.nan
        step(run)

    monkeypatch.setattr(Run, "_one_step", spoilt)


def test_a_stop_keeps_batch_position_and_the_weights_before_it(tiny, monkeypatch):
    poison(monkeypatch, "blocks.1.mlp.down.weight", 4)
    config = tiny("guard.nonfinite=stop")
    with pytest.raises(RunError, match=r"step 4 .*first in blocks\.1\.mlp\.down"):
        train(config)
    folder = Path(config.run) / "capsules" / "step_00000004"
    capsule = Capsule.read(folder)
    assert (capsule.step, capsule.kind, capsule.sequences) == (4, "nonfinite", (12, 15))
    assert capsule.module == "blocks.1.mlp.down (forward), micro-batch 0"
    assert capsule.position["step"] == 3 and capsule.position["drawn"] == 12
    assert capsule.weights["path"] == "weights/step_00000003" and find_newest(folder / "weights")[0] is not None
    assert sorted(read_batches(folder)) == [12, 13, 14, 15]
    assert [p.name for p in (Path(config.run) / "checkpoints").glob("step_*")] == ["step_00000002"]


def test_a_checkpoint_at_that_step_serves_as_the_weights(tiny, monkeypatch):
    poison(monkeypatch, "blocks.0.mlp.up.weight", 3)
    config = tiny("guard.nonfinite=stop")
    with pytest.raises(RunError):
        train(config)
    capsule = Capsule.read(Path(config.run) / "capsules" / "step_00000003")
    assert capsule.weights["path"] == "../../checkpoints/step_00000002"


def test_an_exception_keeps_what_was_raised_and_where(tiny, monkeypatch):
    from shardwright.model.layers import MLP

    forward, calls = MLP.forward, [0]

    def fail(layer, *given):
        calls[0] += 1
        if calls[0] == 10:  # 2 layers, 2 micro-batches a step: the second layer of step 3
            raise ArithmeticError("a kernel gave up")
        return forward(layer, *given)

    monkeypatch.setattr(MLP, "forward", fail)
    config = tiny()
    with pytest.raises(ArithmeticError):
        train(config)
    capsule = Capsule.read(Path(config.run) / "capsules" / "step_00000003")
    assert capsule.what == "ArithmeticError: a kernel gave up" and capsule.module == "blocks.1.mlp"
    assert "test_capsule.py" in capsule.traceback and capsule.weights["step"] == 2


def test_nothing_is_kept_where_none_is_wanted_or_a_user_has_to_mend_it(tiny, monkeypatch):
    poison(monkeypatch, "blocks.0.mlp.up.weight", 2)
    config = tiny("guard.nonfinite=stop", "watch.capsules=false")
    with pytest.raises(RunError):
        train(config)
    assert not (Path(config.run) / "capsules").exists()


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is no capsule"), ('{"format": 9}', "its format is 9"), ("[]", "is no capsule")]
)
def test_what_is_no_capsule_is_refused(tmp_path, text, words):
    (tmp_path / "capsule.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        Capsule.read(tmp_path)
    with pytest.raises(ConfigError, match="name a folder below capsules/"):
        Capsule.read(tmp_path / "gone")


def test_a_damaged_batch_file_is_named(tmp_path):
    batch_path(tmp_path, 0).write_bytes(b"\0" * 40)
    with pytest.raises(ConfigError, match=r"rank_00000\.safetensors: cannot be read"):
        read_batches(tmp_path)


def test_a_folder_has_at_most_a_thousand_files(tmp_path):
    places = [batch_path(tmp_path, rank).parent for rank in range(0, 16_384)]
    assert max(map(places.count, set(places))) <= 1000


def test_bits_are_compared_and_not_numbers():
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone()) and not same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32)) and same_bits(
        torch.ones(()), torch.ones(())
    )


def test_the_module_of_an_error_is_the_innermost_in_its_traceback():
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(2, 3)))
    try:
        model(torch.zeros(1, 5))
    except RuntimeError as error:
        assert module_of(error, [model]) == "1.0" and module_of(error, [torch.nn.ReLU()]) is None


def test_a_capsule_is_json_alone(tiny, monkeypatch):
    poison(monkeypatch, "blocks.0.mlp.up.weight", 1)
    config = tiny("guard.nonfinite=stop")
    with pytest.raises(RunError):
        train(config)
    folder = Path(config.run) / "capsules" / "step_00000001"
    assert json.loads((folder / "capsule.json").read_text())["config"]["model"]["family"] == "gpt2"
    assert {p.suffix for p in folder.rglob("*") if p.is_file() and p.name != "latest"} == {".json", ".safetensors"}
