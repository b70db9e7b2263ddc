"""The Makefile's words to somebody whose machine lacks something: one clear line that names the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs make in the checkout, without what an outer `make test` hands down."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that is not make's own."""
    assert result.returncode != 0 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_no_python(tmp_path: Path) -> None:
    """`PYTHON` names something that is not there."""
    line = complaint(make("venv", f"VENV={tmp_path / 'venv'}", "PYTHON=python3.99"))
    assert "python3.99" in line and "apt-get install python3 python3-venv" in line


@pytest.mark.parametrize("version", ["3, 10, 4", "3, 15, 0"])
def test_another_python(tmp_path: Path, version: str) -> None:
    """A Python outside 3.11 to 3.14."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.version_info = ({version})")
    line = complaint(make("venv", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", PYTHONPATH=str(tmp_path)))
    assert "3.11 to 3.14 needed" in line and "python3.11-venv" in line


def test_no_venv_module(tmp_path: Path) -> None:
    """Debian's python3 without python3-venv has `venv` and no `ensurepip`."""
    (tmp_path / "ensurepip.py").write_text("raise ImportError('not here')")
    line = complaint(make("venv", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", PYTHONPATH=str(tmp_path)))
    assert "apt-get install python3-venv" in line


def test_help_names_every_job() -> None:
    """Plain `make` explains itself."""
    result = make()
    assert result.returncode == 0
    assert all(f"make {job} " in result.stdout for job in ("train", "test", "lint", "bench", "bench-gpu", "clean"))
