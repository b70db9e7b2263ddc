"""The wheel: complete, and enough by itself to train from a config by name, away from the checkout.

The wheel goes into an empty environment that sees this one's packages through a .pth file, so nothing is
downloaded. The environment's own packages come first, so it is the wheel's shardwright that runs.
"""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "shardwright", "configs")

OUTSIDE = {"benchmarks", "shardwright", "tests", "apex"}  # ourselves, and NVIDIA's apex, which is on no index


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command to its end and returns what it printed; a failure shows all of it."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    pip = (sys.executable, "-m", "pip", "-qq", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", copy / "dist", copy, cwd=copy)
    (built,) = (copy / "dist").glob("shardwright-*.whl")
    return built


@pytest.fixture(scope="module")
def away(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder far from the checkout with an environment `env` that holds the wheel."""
    folder = tmp_path_factory.mktemp("away")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder)
    python = folder / "env/bin/python"
    run(sys.executable, "-m", "pip", "-qq", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    (own,) = (folder / "env/lib").glob("python*/site-packages")
    (own / "dependencies.pth").write_text(str(Path(torch.__file__).resolve().parents[1]) + "\n")
    return folder


def test_the_wheel_holds_every_source_config_and_corpus(wheel: Path) -> None:
    """A room without __init__.py or a config in a new folder would be left out silently."""
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "shardwright").rglob("*.py")}
    expected |= {f"shardwright/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    bundled = {str(path.relative_to(ROOT)) for path in (ROOT / "shardwright/data/bundled").iterdir()}
    assert len(bundled) >= 3
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert expected | bundled <= names, sorted((expected | bundled) - names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "configs/"))]


def test_the_wheel_is_what_runs_away_from_the_checkout(away: Path) -> None:
    """Otherwise the test of training would test the checkout."""
    code = "import shardwright, shardwright.configs; print(shardwright.__file__, shardwright.configs.__file__)"
    places = run(away / "env/bin/python", "-c", code, cwd=away).split()
    assert len(places) == 2 and all(place.startswith(str(away / "env")) for place in places), places


@pytest.mark.slow
def test_it_trains_from_a_config_by_name(away: Path) -> None:
    """`shardwright prepare`, then `train debug/gpt2` and `generate`, with nothing but the wheel."""
    shardwright = away / "env/bin/shardwright"
    settings = ("prepare", "bundled:english", "--output", "data/english", "tokenizer.vocab_size=512")
    run(shardwright, *settings, cwd=away)
    run(shardwright, "train", "debug/gpt2", "train.steps=3", cwd=away)
    assert (away / "runs/debug-gpt2/metrics.jsonl").read_text().count('"loss"') >= 3
    text = run(shardwright, "generate", "runs/debug-gpt2", "--prompt", "The", "--tokens", "5", cwd=away)
    assert any(line.startswith("The") for line in text.splitlines()), text


def imported(path: Path) -> Iterator[str]:
    """Top-level names of the packages a file imports, lazy imports included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def declared() -> list[tuple[str, Requirement]]:
    """(extra or "", requirement) for every dependency of setup.py, read without running it."""
    values = {}
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "ROOT":
            values[node.targets[0].id] = ast.literal_eval(node.value)
    extras = {"": values["REQUIRES"]} | values["EXTRAS"]
    return [(extra, Requirement(text)) for extra, texts in extras.items() for text in texts]


def test_every_import_is_declared() -> None:
    """Each third-party package that sources or tests import stands in setup.py, as a dependency or in an extra."""
    names = {canonicalize_name(requirement.name) for _, requirement in declared()}
    known = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("shardwright", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for name in set(imported(path)) - set(sys.stdlib_module_names) - OUTSIDE
        if not names & {canonicalize_name(distribution) for distribution in known.get(name, [name])}
    }
    assert not undeclared, sorted(undeclared)


def test_pins_and_ranges_agree() -> None:
    """What CI installs is pinned inside its range, and torch without a local tag such as +cpu."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    pins: dict[str, str] = {canonicalize_name(name): version for name, version in pairs}
    assert pins["torch"] == "2.13.0"
    assert not [pin for pin in pins.values() if "+" in pin]
    installed_by_ci = [requirement for extra, requirement in declared() if extra not in ("s3", "wandb")]
    for requirement in installed_by_ci:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
