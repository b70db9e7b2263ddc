"""The Python face: what a notebook calls."""

import subprocess
import sys

import torch

import shardwright


def test_train_then_load_then_train_again(prepared, tmp_path):
    config = {
        "run": str(tmp_path / "run"),
        "model": {"family": "llama", "layers": 1, "width": 32, "heads": 2, "max_length": 64},
        "objective": {"name": "causal"},
        "data": {"path": str(prepared), "sequence_length": 64},
        "batch": {"sequences": 4, "micro": 4},
        "train": {"steps": 3, "compile": False},
    }
    result = shardwright.train(config, log__every=1)
    assert result.step == 3
    loaded = shardwright.load(result.run)
    ids = torch.from_numpy(loaded.tokenizer.encode("The people").astype("int64"))[None]
    assert loaded(input_ids=ids)["logits"].shape == (1, ids.shape[1], 512)
    assert shardwright.train(config, log__every=1) == result


def test_importing_the_package_does_not_import_torch():
    code = "import sys, shardwright; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
