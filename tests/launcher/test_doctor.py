"""doctor: real checks and measurements of this machine, its exit code, and what it says of what is missing."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwright import __version__
from shardwright.launcher import checks, speed
from shardwright.launcher.checks import Check
from shardwright.launcher.doctor import is_fit, show, verdict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What doctor says as JSON, away from the checkout, in a process that a launcher believes to be rank 7 of 8."""
    folder = tmp_path_factory.mktemp("elsewhere")
    code = "import sys; from shardwright.launcher.doctor import doctor; sys.exit(doctor(json=True, seconds=0.5))"
    place = {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}
    environment = os.environ | place | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == [], "it leaves nothing behind"
    return {"folder": folder} | json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(answer: dict[str, Any]) -> list[Check]:
    return [Check(**check) for check in answer["checks"]]


def of(found: list[Check], name: str) -> Check:
    """The check of this name."""
    return next(check for check in found if check.name == name)


def test_every_check_is_one_line_with_a_remedy_where_something_lacks(found: list[Check]) -> None:
    assert {check.group for check in found} == {"machine", "torch", "features", "speed"}
    for check in found:
        assert check.status in ("ok", "missing", "warning", "failed")
        assert "\n" not in check.detail + check.remedy
        assert check.remedy or check.status == "ok" or check.name == "GPU"


def test_the_answer_is_one_object(answer: dict[str, Any]) -> None:
    assert answer["ok"] is True
    assert answer["version"] == __version__


def test_the_machine_is_as_the_system_says(found: list[Check], answer: dict[str, Any]) -> None:
    assert f"{len(os.sched_getaffinity(0))} cores usable" in of(found, "processor").detail
    total, free = checks.memory()
    assert 0 < free <= total
    assert f"{total / checks.GIB:.1f} GiB" in of(found, "memory").detail
    assert str(answer["folder"]) in of(found, "disk").detail


def test_two_processes_really_reduce(found: list[Check]) -> None:
    reduce = of(found, "gloo all-reduce")
    assert reduce.status == "ok", reduce.detail
    assert re.fullmatch(r"1 MB between 2 processes in [\d.]+ ms, [\d.]+ [kMG]B/s bus bandwidth", reduce.detail)
    for number_format in ("fp32", "bf16", "fp16"):
        assert re.fullmatch(r"[\d.]+ [MGTP]FLOP/s on (cpu|cuda)", of(found, f"{number_format} matmul").detail)


def test_a_backend_that_cannot_start_is_a_failure_with_its_reason() -> None:
    check = speed.check_all_reduce("no_such_backend", size=1)
    assert check.status == "failed"
    assert "no_such_backend" in check.detail.lower()
    assert not is_fit([check])


def test_the_exit_code_and_the_verdict_follow_the_worst_finding() -> None:
    fine = [Check("machine", "disk", "ok", "1 GiB free")]
    lacking = [*fine, Check("features", "DeepSpeed", "missing", "without deepspeed", "pip install it")]
    broken = [*lacking, Check("speed", "gloo all-reduce", "failed", "no answer")]
    assert [is_fit(found) for found in (fine, lacking, broken)] == [True, True, False]
    assert verdict(fine) == "Training works here."
    assert verdict(lacking) == "Training works here; of 2 checks 1 optional and missing."
    assert verdict(broken) == "Not all of this machine works; of 3 checks 1 failed, 1 optional and missing."


def test_the_table_shows_every_finding_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    show([Check("features", "DeepSpeed", "missing", "without [deepspeed]", "pip install 'shardwright[deepspeed]'")])
    shown = capsys.readouterr().out
    assert re.search(r"missing +DeepSpeed +without \[deepspeed\]", shown)
    assert "-> pip install 'shardwright[deepspeed]'" in shown


def test_every_feature_names_the_extra_that_brings_it() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    table = ast.literal_eval(re.search(r"^EXTRAS = (\{.*?^\})", setup, re.M | re.S)[1])  # type: ignore[index]
    extras = {extra: {re.split("[>=<]", package)[0] for package in packages} for extra, packages in table.items()}
    for feature in checks.FEATURES:
        assert set(feature.modules) <= extras[feature.extra], feature.name
    named = {module for feature in checks.FEATURES for module in feature.modules}
    assert extras["data"] - named == {"lxml_html_clean"}, "which trafilatura needs"


@pytest.mark.parametrize(
    ("file", "status", "words"),
    [
        ("apex/optimizers/fused_adam.py", "ok", "apex"),
        ("apex/lib/libapex.py", "warning", "PyPI's unrelated project"),
        (None, "missing", "not needed"),
    ],
)
def test_nvidias_apex_is_told_from_its_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, status: str, words: str
) -> None:
    if file is None and importlib.util.find_spec("apex"):
        pytest.skip("an apex is installed here")
    if file is not None:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
        (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    check = checks.check_apex()
    assert check.status == status
    assert words in check.detail
    assert "unrelated" in check.detail + check.remedy or status == "ok"


def test_a_missing_or_broken_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'probe.cpp: fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    check = checks.check_compiler()
    assert check.status == "warning"
    assert "Python.h: No such file" in check.detail
    assert "apt-get install g++ python3." in check.remedy
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert checks.check_compiler().status == "missing"


def test_a_disk_that_cannot_be_written_is_a_warning() -> None:
    check = speed.check_disk_speed(Path("/proc"), mib=1)
    assert check.status == "warning"
    assert "cannot write in /proc" in check.detail
