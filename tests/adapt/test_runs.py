"""Adapted runs from end to end: begun from a run, resumed, loaded, exported for peft, merged, and gone on with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.adapt.lora import LEAVES
from shardwright.config import Config, ConfigError
from shardwright.train.exports import export_model
from shardwright.train.load import Loaded, load
from shardwright.train.run import train
from tests.train.conftest import tiny

__all__ = ["tiny"]

LORA = ("adapt.method=lora", "adapt.rank=3", "adapt.alpha=6")
STEP = "checkpoints/step_{:08d}"


def opened(place: Path) -> Loaded:
    return load(place, device="cpu")


def weights(place: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in opened(place).model.named_parameters()}


@pytest.fixture
def base(tiny: Callable[..., Config]) -> Path:
    """A run to begin from."""
    config = tiny("train.steps=4")
    train(config)
    return Path(config.run or "")


def test_begins_equal_trains_the_adapter_and_resumes(tiny: Callable[..., Config], base: Path, tmp_path: Path) -> None:
    settings = (*LORA, f"begin={base}", "adapt.dropout=0.1", "checkpoint.keep_last=9")
    run, ids = tmp_path / "lora", torch.arange(2, 40).view(1, -1)
    train(tiny(*settings, f"run={run}"))
    first, last = run / STEP.format(0), run / STEP.format(6)
    assert torch.equal(opened(first)(input_ids=ids)["logits"], opened(base)(input_ids=ids)["logits"])
    before, after = weights(first), weights(last)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.rpartition(".")[2] in LEAVES}
    assert {name.rsplit(".", 2)[1] for name in changed} == {"q", "v"}
    shutil.rmtree(last)
    (run / "checkpoints/latest").unlink(missing_ok=True)
    train(tiny(*settings, f"run={run}"))
    again = weights(last)
    assert all(torch.equal(after[name], again[name]) for name in after), "resumed to the same bits"


def test_exports_merges_and_goes_on_from_peft(tiny: Callable[..., Config], base: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run, ids = tmp_path / "lora", torch.arange(2, 40).view(1, -1)
    train(tiny(*LORA, f"begin={base}", f"run={run}"))
    expected = opened(run)(input_ids=ids)["logits"]
    export_model(base, tmp_path / "base")
    adapter = export_model(run, tmp_path / "adapter")
    assert adapter.verdict is not None and adapter.verdict.passed
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    both = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    whole = export_model(run, tmp_path / "merged", merge=True)
    assert whole.verdict is not None and whole.verdict.passed
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        for model in (both, alone):
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    go_on = tiny(
        *LORA, f"begin={base}", f"adapt.begin={tmp_path}/adapter", f"run={tmp_path}/on", "checkpoint.keep_last=9"
    )
    train(go_on)
    found = opened(tmp_path / "on" / STEP.format(0))(input_ids=ids)["logits"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "settings",
    [
        ("adapt.method=prompt",),
        ("adapt.method=p_tuning", "adapt.encoder_width=16"),
        ("adapt.method=prefix",),
        ("adapt.method=prefix", "adapt.projection=16"),
    ],
    ids=" ".join,
)
def test_virtual_tokens_are_trained_resumed_and_exported(
    tiny: Callable[..., Config], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """GPT-2 with room for 4 tokens more; packed documents."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    room, ids = ("adapt.tokens=4", "data.sequence_length=60"), torch.arange(2, 40).view(1, -1)
    train(tiny("train.steps=2", "data.sequence_length=60"))
    base, run = tmp_path / "run", tmp_path / "adapted"
    begun = (*settings, *room, f"begin={base}", f"run={run}", "checkpoint.keep_last=9")
    train(tiny(*begun))
    last = run / STEP.format(6)
    before, after = weights(run / STEP.format(0)), weights(last)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(after) - set(weights(base)), "all of the adapter, and nothing else"
    shutil.rmtree(last)
    (run / "checkpoints/latest").unlink(missing_ok=True)
    train(tiny(*begun))
    assert all(torch.equal(after[name], tensor) for name, tensor in weights(last).items())
    export_model(base, tmp_path / "base")
    export_model(run, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    both = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        found = both(ids).logits[:, -ids.shape[1] :]
    assert torch.allclose(found, opened(run)(input_ids=ids)["logits"], atol=1e-5)
    with pytest.raises(ConfigError, match="--merge: adapt.method=.* virtual tokens"):
        export_model(run, tmp_path / "merged", merge=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("adapt.method=prompt", "adapt.tokens=4"), "data.sequence_length=64: with the 4 virtual tokens"),
        (("adapt.method=lora", "adapt.begin=nowhere"), "adapt.begin: an adapter goes with the model"),
        (("adapt.method=lora", "adapt.targets=[gate]"), "adapt.targets: no layer"),
        (("adapt.freeze=[nothing.*]",), "adapt.freeze: 'nothing"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(
    tiny: Callable[..., Config], settings: tuple[str, ...], said: str
) -> None:
    config = tiny(*settings)
    with pytest.raises(ConfigError, match=said):
        train(config)
    assert not Path(config.run or "").exists()


def test_another_adapter_beneath_is_refused(tiny: Callable[..., Config], base: Path, tmp_path: Path) -> None:
    train(tiny(*LORA, f"begin={base}", f"run={tmp_path}/lora", "train.steps=1"))
    with pytest.raises(ConfigError, match="has an adapter of its own .* --merge"):
        train(tiny(f"begin={tmp_path}/lora", f"run={tmp_path}/plain"))
    with pytest.raises(ConfigError, match="its LoRA is multiplied by 2 .* this one by 4"):
        train(tiny(*LORA, "adapt.alpha=12", f"begin={tmp_path}/lora", f"run={tmp_path}/louder"))


def test_mistakes_of_exports(tiny: Callable[..., Config], base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--merge: .* has no adapter"):
        export_model(base, tmp_path / "out", merge=True)
    given: Any = tiny(*LORA, "adapt.train=['embed.tokens.*']", f"begin={base}", f"run={tmp_path}/lora", "train.steps=1")
    train(given)
    with pytest.raises(ConfigError, match="transformer.wte.weight is shared.*--merge"):
        export_model(tmp_path / "lora", tmp_path / "out")
