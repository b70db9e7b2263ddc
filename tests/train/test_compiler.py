"""Machines that lack what torch.compile builds with: blocks run uncompiled there, or one line says what is wrong."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from shardwright.train import compiler
from shardwright.train.layout import wants_compile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch):
    """Each test asks for itself."""
    monkeypatch.delenv("CXX", raising=False)
    compiler.can_compile.cache_clear()
    yield
    compiler.can_compile.cache_clear()


def program(folder: Path, name: str, text: str = "exit 1") -> Path:
    """An executable that fails, unless it is asked for its version."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "g++ (GCC) 13.2.0"; exit 0;; esac\n{text}\n')
    path.chmod(0o755)
    return path


def test_without_a_compiler_that_torch_calls(tiny, tmp_path, monkeypatch, caplog):
    program(tmp_path / "bin", "clang++")  # which torch does not try on Linux
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    config = tiny("train.compile=auto")
    assert not wants_compile(config) and not wants_compile(config)
    assert caplog.text.count("no C++ compiler found: blocks run uncompiled (Debian: apt-get install g++)") == 1
    assert wants_compile(tiny("train.compile=true"))


def test_without_pythons_headers(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", str(program(tmp_path / "bin", "c++")))
    assert compiler.can_compile() == Path(sysconfig.get_path("include"), "Python.h").is_file()
    compiler.can_compile.cache_clear()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert not wants_compile(tiny("train.compile=auto"))
    assert "no Python.h found: blocks run uncompiled (Debian: apt-get install python3." in caplog.text


def test_a_compiler_that_fails_is_one_line(tmp_path):
    broken = program(tmp_path / "bin", "g++", "echo 'main.cpp:2:10: fatal error: omp.h: No such file' >&2; exit 1")
    code = (
        "import torch; from shardwright.train.compiler import compiling\n"
        "from shardwright.launcher.cli import guarded\n"
        "def run():\n    with compiling(): torch.compile(lambda x: x * 2 + 1)(torch.ones(8))\n"
        "raise SystemExit(guarded(run))"
    )
    own = {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "train.compile: torch cannot build a kernel: " in done.stderr and "omp.h: No such file" in done.stderr
    assert "train.compile=false trains without it" in done.stderr
