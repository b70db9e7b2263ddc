"""Every family trains by its debug config, and what it has learned can be loaded: the column *pretrain* of
docs/families.md. benchmarks/families.py has 300 steps of each on real text in two languages.
"""

import json
import math
from pathlib import Path

import pytest

from shardwright.config import ConfigError, parse
from shardwright.data.prepare import PrepareConfig, prepare
from shardwright.model.families import FAMILIES
from shardwright.train.load import load
from shardwright.train.run import train
from shardwright.train.settings import read_config


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of sources and targets."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"source": f"number {n} and {n + 1}", "target": f"{n + 1} and {n} number"} for n in range(400)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    raw = {
        "input": [str(folder / "pairs.jsonl")],
        "output": str(folder / "prepared"),
        "text_field": "source",
        "target_field": "target",
        "tokenizer": {"vocab_size": 300},
        "validation_every": 10,
    }
    prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    return folder / "prepared"


@pytest.mark.parametrize("family", FAMILIES)
def test_pretrain(family: str, prepared: Path, pairs: Path, tmp_path: Path) -> None:
    data = pairs if family == "transformer" else prepared
    small = ["train.steps=8", "batch.sequences=8", "data.sequence_length=64", "evaluate.max_tokens=512"]
    free = [f"run={tmp_path / 'run'}", f"data.path={data}", "checkpoint.every=null", "log.tensorboard=false"]
    config = read_config(f"debug/{family}", [*small, *free])
    result = train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert result.step == len(losses) == 8 and all(map(math.isfinite, losses))
    assert sum(losses[-2:]) < sum(losses[:2]), "eight steps are enough to learn which tokens are frequent"
    assert math.isfinite(next(line["val_loss"] for line in lines if "val_loss" in line))
    model = load(result.run).model
    assert model.config.family == family and not model.training


def test_targets_longer_than_the_model_knows_places_are_refused(pairs: Path, tmp_path: Path) -> None:
    free = [f"run={tmp_path / 'run'}", f"data.path={pairs}", "data.sequence_length=64"]
    for target, more in ((256, []), (128, ["adapt.method=prefix", "adapt.tokens=20"])):
        asked = f"objective={{name: pairs, target_length: {target}, start: end, begin: true}}"
        with pytest.raises(ConfigError, match=f"objective.target_length={target}: .* raise model.max_length=128"):
            train(read_config("debug/bart", [*free, asked, *more]))
