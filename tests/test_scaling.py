"""benchmarks/scaling.py: points are measured in real worlds, and reported in a page that a browser likes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import open_browser

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "scaling.py"


def point(layout: str, mode: str, processes: int, rate: float) -> dict:
    """A line as a cluster's job writes it."""
    return {
        "benchmark": "scaling", "config": "llama", "set": [], "threads": 1, "timed": 8, "mode": mode, "layout": layout,
        "keys": [], "processes": processes, "sequences": 8 * processes if mode == "weak" else 8, "tokens": 4096,
        "tokens_per_s": rate, "memory_gib": 1.5, "device": "cuda", "communication_share": 0.1, "hosts": 1,
        "step_s": {"median": 1.0, "low": 0.9, "high": 1.1, "steps": 8}, "date": "2026-01-01", "commit": "abc",
        "torch": "2.13.0", "host": "node", "cores_per_process": 8, "load": 1.0,
    }  # fmt: skip


def test_a_cut_line_spoils_no_other(tmp_path, monkeypatch):
    """What is written after a kill stands on a line of its own."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    common = importlib.import_module("common")
    path = tmp_path / "points.jsonl"
    common.add_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"cut')
    common.add_line(path, {"a": 2})
    common.add_line(path, {"a": 3})
    assert [line["a"] for line in common.read_lines(path)] == [1, 2, 3]


def test_points_of_several_files_become_a_page(tmp_path):
    one, more = tmp_path / "one.jsonl", tmp_path / "more.jsonl"
    lines = [point("zero3", mode, n, 90.0 * n) for mode in ("weak", "strong") for n in (2, 4, 8)]
    one.write_text("".join(json.dumps(point("one process", mode, 1, 100.0)) + "\n" for mode in ("weak", "strong")))
    more.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    out, page = tmp_path / "scaling.md", tmp_path / "scaling.html"
    command = [sys.executable, str(SCRIPT), "--report", str(one), str(more), "--out", str(out), "--html", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["points"] == 8 and found["best_efficiency"]["weak"] == [0.9, "zero3", 8]
    assert "| zero3 | 8 | 64 | 720 | 1000 (900 to 1100) | 0.90 | 10% | 1.50 | 1 |" in out.read_text()
    with open_browser() as browser:
        for width, dark in ((1440, False), (390, True)):
            shown = browser.open(page, width=width, dark=dark)
            assert shown.errors == [] and shown.requests == []
            assert shown.evaluate("document.querySelectorAll('.plot .scatterlayer .trace').length") == 6
            assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
@pytest.mark.in_turn
def test_a_point_is_measured_in_the_world_it_is_started_in(prepared, tmp_path):
    points = tmp_path / "points.jsonl"
    settings = [f"data.path={prepared}", f"run={tmp_path / 'run'}", "model.width=32"]
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(SCRIPT), "--point", "--mode", "strong", "--layout", "tensor", "--points", str(points)]
        command += ["--total", "4", "--steps", "2", "--warm", "1", "--set", *settings]
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=280)
    one, two = (json.loads(line) for line in points.read_text().splitlines())
    assert (one["processes"], two["processes"], two["keys"]) == (1, 2, ["parallel.tensor=2"])
    assert one["efficiency"] == 1 and 0 < two["efficiency"] == two["tokens_per_s"] / (2 * one["tokens_per_s"])
    assert one["communication_share"] == 0 < two["communication_share"] <= 1
    assert two["tokens"] == 4 * 128 and two["step_s"]["low"] <= two["step_s"]["median"] <= two["step_s"]["high"]
