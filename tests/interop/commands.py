"""Commands as a user gives them, and what is in the folders that they leave. No test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwright.interop.weights import WeightFiles
from shardwright.launcher.cli import run


def done(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that succeeds prints."""
    code = run([str(a) for a in arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, says: str, code: int = 2) -> None:
    """A command that ends with its code and one line."""
    capsys.readouterr()  # what transformers has said of its saving
    assert run([str(a) for a in arguments]) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said


def same(first: Path, second: Path) -> None:
    """Two folders hold the same tensors to the bit."""
    mine, theirs = WeightFiles(first), WeightFiles(second)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]), name


def logits(folder: Path, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """Of transformers' own model, opened as its users open one."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(ids).logits
