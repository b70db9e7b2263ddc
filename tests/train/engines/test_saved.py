"""What each engine saves is a checkpoint as any other: `eval` and `generate` give what the run itself said of it."""

from __future__ import annotations

import importlib.util
import json

import pytest

from shardwright.launcher.cli import run as command
from tests.equivalence.cells import LOSS, config, relative
from tests.equivalence.work import run

SETTINGS = {
    "native": ["parallel.zero=3"],
    "deepspeed": ["engine=deepspeed", "parallel.zero=3"],
    "deepspeed_bf16": ["engine=deepspeed", "parallel.zero=2", "precision.compute=bf16"],
    "accelerate": ["engine=accelerate", "parallel.zero=3"],
    "accelerate_ddp": ["engine=accelerate", "parallel.zero=0"],
}
GENERATE = ["--prompt", "Fellow citizens", "--tokens", "20", "--temperature", "0"]


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """The same run natively in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(config(prepared, folder), [])
    return folder


@pytest.mark.in_turn
@pytest.mark.parametrize("name", SETTINGS)
def test_eval_and_generate_read_it(name, alone, ranks, prepared, tmp_path, capsys):
    engine = name.partition("_")[0]
    if engine != "native" and importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed: pip install 'shardwright[{engine}]'")
    folder = tmp_path / "run"
    records = ranks.run(2, "tests.equivalence.work:run", config(prepared, folder), SETTINGS[name])[0]
    assert command(["eval", str(folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    rounding = 1e-3 if "bf16" in name else LOSS  # it says so in bf16, and `eval` in float32
    assert relative(figures["val_loss"], records[-1]["val_loss"]) < rounding
    texts = []
    for place in (alone, folder, max((folder / "checkpoints").glob("step_*"))):
        assert command(["generate", str(place), *GENERATE]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[2] and len(texts[1]) > len("Fellow citizens\n")
    assert "bf16" in name or texts[0] == texts[1]
