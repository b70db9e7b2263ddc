"""The rooms of the package have an order: a lower room never imports a higher one, nor a sibling of its own tier.

Every import counts, also lazy ones inside functions, those under TYPE_CHECKING, relative ones, and names given
as text to `importlib.import_module`. The check reads the source and imports nothing.
"""

import ast
import re
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "shardwright"

# Lowest first. Rooms of one tier are siblings and import each other only in the foundation.
TIERS: tuple[tuple[str, ...], ...] = (
    ("config", "log", "hardware", "configs"),
    ("model", "objective", "parallel"),
    ("data", "checkpoint", "estimate"),
    ("interop", "adapt"),
    ("train",),
    ("planner", "serve"),
    ("launcher",),
)
RANK = {room: rank for rank, rooms in enumerate(TIERS) for room in rooms}
FOUNDATION = 0

# The package's own front door (`shardwright.load`, `python -m shardwright`) reaches every room, and no room may use
# it to reach another: from the package itself only this may be taken.
FRONT_DOORS = {"__init__", "__main__"}
NEUTRAL_NAMES = {"__version__"}

# Functions whose first argument names a module.
LOADERS = {"import_module", "__import__", "find_spec", "files"}


def room_of(path: Path, package: Path) -> str:
    """The room a source file belongs to: the first part of its path inside the package."""
    return path.relative_to(package).with_suffix("").parts[0]


def absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    """The module a `from ... import` names, with leading dots resolved against the file's place."""
    if node.level == 0:
        return node.module or ""
    parts = path.relative_to(package.parent).with_suffix("").parts[: -node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def names_used(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports or reaches through the bare package, whatever it is called."""
    packages, loaders = {package.name} | aliases(tree, {package.name}), LOADERS | aliases(tree, LOADERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path, package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            yield node.lineno, f"{package.name}.{node.attr}"
        elif isinstance(node, ast.Call) and last_name(node.func) in loaders:
            name, anchor = argument(node, 0, "name"), argument(node, 1, "package")
            if name.startswith("."):  # without an anchor in plain text it is the file's own package
                own = ".".join(path.relative_to(package.parent).parts[:-1])
                name = resolve_name(name, anchor or own)
            yield node.lineno, name


def aliases(tree: ast.AST, names: set[str]) -> set[str]:
    """What else a file calls one of these: `import x as y`, `from m import x as y`, `y = m.x`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname for alias in node.names if alias.asname and alias.name in names}
        elif isinstance(node, ast.Assign) and last_name(node.value) in names:
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def last_name(node: ast.AST) -> str:
    """The last part of a dotted name: `import_module` of `importlib.import_module`; empty for anything else."""
    return getattr(node, "attr", getattr(node, "id", ""))


def argument(node: ast.Call, place: int, name: str) -> str:
    """An argument given as plain text, by place or name; empty where there is none."""
    given = [k.value for k in node.keywords if k.arg == name] + node.args[place : place + 1]
    texts = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return texts[0] if texts else ""


def complaint(own: str, dotted: str, package: str) -> str | None:
    """Why a file of room `own` may not use `dotted`; None where it may."""
    parts = dotted.split(".")
    if parts[0] != package or len(parts) == 1:
        return None
    other = parts[1]
    if other == own or other in NEUTRAL_NAMES:
        return None
    if other not in RANK:
        return f"{dotted} is not a room; take what you need from the room that has it"
    if RANK[other] > RANK[own]:
        return f"{own} is below {other}"
    if RANK[other] == RANK[own] != FOUNDATION:
        return f"{own} and {other} are siblings"
    return None


def violations(package: Path) -> list[str]:
    """Every forbidden import of a package, as `file:line: reason`; empty when the order holds."""
    found = []
    for path in sorted(package.rglob("*.py")):
        own = room_of(path, package)
        where = path.relative_to(package.parent)
        if own in FRONT_DOORS:
            continue
        if own not in RANK:
            found.append(f"{where}: `{own}` has no place in TIERS")
            continue
        tree = ast.parse(path.read_text("utf-8"), str(path))
        for line, dotted in sorted(set(names_used(tree, path, package))):
            reason = complaint(own, dotted, package.name)
            if reason:
                found.append(f"{where}:{line}: {reason}")
    return found


def test_the_package_keeps_its_order() -> None:
    """The package as it is."""
    assert len(list(PACKAGE.rglob("*.py"))) > 10
    assert violations(PACKAGE) == []


def plant(root: Path, file: str, source: str) -> list[str]:
    """Violations of a little package of the same name in which `file` holds `source`."""
    package = root / "shardwright"
    for name in ("__init__.py", "model/__init__.py", "train/run.py", "data/shards.py", file):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / file).write_text(source, "utf-8")
    return violations(package)


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("model/gpt.py", "from shardwright.train.run import train", "model is below train"),
        ("model/gpt.py", "import shardwright.launcher.cli as cli", "model is below launcher"),
        ("model/gpt.py", "def f():\n    from shardwright.data import shards", "model is below data"),
        ("model/gpt.py", "from ..parallel import mesh", "model and parallel are siblings"),
        ("model/deep/gpt.py", "from ...train.run import x", "model is below train"),
        ("model/gpt.py", "from .. import train", "model is below train"),
        ("model/gpt.py", "if TYPE_CHECKING:\n    from shardwright.serve import x", "model is below serve"),
        ("model/gpt.py", "import importlib\nimportlib.import_module('shardwright.train')", "model is below train"),
        ("model/gpt.py", "from shardwright import data", "model is below data"),
        ("model/gpt.py", "import shardwright\nshardwright.train", "model is below train"),
        ("model/gpt.py", "import shardwright as sw\nsw.train.run", "model is below train"),
        ("model/gpt.py", "import shardwright\nsw = shardwright\nsw.train.run", "model is below train"),
        ("model/gpt.py", "importlib.import_module('.train', 'shardwright')", "model is below train"),
        ("model/gpt.py", "importlib.import_module('.train', package='shardwright')", "model is below train"),
        ("model/deep/gpt.py", "importlib.import_module('...train.run', __package__)", "model is below train"),
        ("model/gpt.py", "importlib.import_module(name='shardwright.train')", "model is below train"),
        ("model/gpt.py", "from importlib import import_module as im\nim('shardwright.train')", "model is below train"),
        ("model/gpt.py", "im = importlib.import_module\nim('shardwright.train')", "model is below train"),
        ("data/order.py", "from shardwright.checkpoint import save", "data and checkpoint are siblings"),
        ("data/order.py", "from shardwright import load", "load is not a room"),
        ("config/reading.py", "from shardwright.model import families", "config is below model"),
        ("attic/old.py", "", "`attic` has no place in TIERS"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, reason: str) -> None:
    """The check is worth something only if it fails where it should."""
    found = plant(tmp_path, file, source)
    assert len(found) == 1 and reason in found[0], found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("train/step.py", "from shardwright.model import gpt\nfrom shardwright import __version__"),
        ("train/step.py", "from . import run\nfrom ..data.shards import Shard\nimport torch.nn, os.path"),
        ("hardware.py", "from shardwright.config import ConfigError"),
        ("train/step.py", "import shardwright as sw\nsw.data\nimport_module('.run', __package__)\nimport_module(name)"),
        ("__init__.py", "def load(path):\n    from shardwright.launcher import cli"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, file: str, source: str) -> None:
    """Downward, inside a room, inside the foundation, and from the front door."""
    assert plant(tmp_path, file, source) == []


LAYOUT_NAMES = re.compile(
    r"pipeline|fsdp|zero[ _-]?[0-3]|(tensor|context|sequence|data)[ _-]?parallel|dtensor|torch\.distributed|"
    r"device_?mesh"
)


def test_no_layout_is_named_where_models_are() -> None:
    """Adding a layout touches `parallel/` and what builds a run from it, never a model."""
    for path in sorted((PACKAGE / "model").glob("*.py")):
        found = LAYOUT_NAMES.search(path.read_text("utf-8").lower())
        assert found is None, f"{path.name}: {found and found[0]}"


# Where the degrees of a layout may be told apart; what else trains asks `World` for copies, and knows the data axis.
LAYOUT_ROOMS = ("parallel", "estimate", "planner", "launcher")
LAYOUT_FILES = {"train/layout.py", "train/preview.py", "config/sections.py"}
QUESTIONS = ("degree", "index")
DEGREES = {"replicate", "shard", "context", "tensor", "pipeline"}


def layout_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, axis) of each question after one axis: `world.degree("tensor")`, `config.parallel.tensor`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call | ast.Attribute):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in QUESTIONS:
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "attr", "") == "parallel":
            names = [node.attr]
        else:
            names = []
        yield from ((node.lineno, name) for name in names if name in DEGREES)


def test_a_layout_is_known_where_it_is_built_and_nowhere_else() -> None:
    """Adding an axis touches parallel/ and train/layout.py, with the formulas and pages that describe it."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if room_of(path, PACKAGE) not in LAYOUT_ROOMS and str(path.relative_to(PACKAGE)) not in LAYOUT_FILES
        for line, name in layout_names(ast.parse(path.read_text("utf-8")))
    ]
    assert not found, "ask World for what the axis means instead: " + "; ".join(found)
    planted = ast.parse('x / world.degree("tensor") + config.parallel.pipeline')
    assert sorted(name for _, name in layout_names(planted)) == ["pipeline", "tensor"]
