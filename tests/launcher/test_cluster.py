"""doctor --cluster: real ranks, each fault planted on one of them, and the line that names it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from shardwright.config import ConfigError, RunError
from shardwright.launcher.cluster import STEPS, check_names, doctor_cluster
from shardwright.launcher.rollcall import Fault, RollCall, _knock
from shardwright.launcher.survey import has_kernels
from shardwright.launcher.world import Place
from tests.ranks import Ranks, free_port

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()
WORK = "tests.launcher.work_cluster:examine"


@pytest.fixture
def overrides(prepared: Path, tmp_path: Path) -> list[str]:
    """Of debug/gpt2, for a run below `tmp_path` over a corpus that is there."""
    return [f"data.path={prepared}", f"run={tmp_path / 'runs' / 'one'}"]


def failed(answer: dict[str, Any]) -> dict[str, str]:
    """Step -> line of what failed."""
    return {c["name"]: f"{c['detail']}; {c['remedy']}" for c in answer["checks"] if c["status"] == "failed"}


@pytest.mark.in_turn
def test_a_sound_cluster(ranks: Ranks, overrides: list[str], tmp_path: Path) -> None:
    answers = ranks.run(3, WORK, "", "debug/gpt2", overrides)
    assert [code for code, _, _ in answers] == [0, 0, 0]
    assert [answer for _, answer, _ in answers[1:]] == [None, None], "rank 0 alone speaks"
    answer = answers[0][1]
    assert answer["ok"] and answer["processes"] == 3
    assert [check["name"] for check in answer["checks"]] == ["ranks", *(step.name for step in STEPS)]
    assert {check["status"] for check in answer["checks"]} == {"ok"}
    assert list(tmp_path.iterdir()) == [], "the run folder that it made for the test is gone"


@pytest.mark.parametrize(
    ("fault", "step", "words"),
    [
        ("versions", "versions", "torch is 2.12.9, on rank 0 2."),
        ("clock", "clock", "the clock is 77.5 s ahead of that of rank 0 (known to "),
        ("interface", "interface", "GLOO_SOCKET_IFNAME=nosuch0: this host has no such interface; unset"),
        (
            "inside",
            "interface",
            "interface lo reaches this host only, and the ranks are on 2; unset GLOO",
        ),
        ("read-only", "run folder", "cannot be written: Read-only file system; mend its permissions"),
        ("sum", "all-reduce", "the sum of an all-reduce is 4 to 4 instead of 3"),
    ],
)
def test_a_fault_is_named_with_its_rank_host_and_remedy(
    ranks: Ranks, overrides: list[str], tmp_path: Path, fault: str, step: str, words: str
) -> None:
    answers = ranks.run(2, WORK, fault, "debug/gpt2", overrides)
    assert [code for code, _, _ in answers] == [1, 1]
    found = failed(answers[0][1])
    assert words in found[step], found
    names = "all 2 ranks: " if fault in ("sum", "inside") else f"rank 1 on {HOST}: "
    assert found[step].startswith(names)
    assert set(found) == {step}
    assert list(tmp_path.iterdir()) == []


def test_what_needs_a_failed_step_is_not_tried(ranks: Ranks, overrides: list[str]) -> None:
    answer = ranks.run(2, WORK, "interface", "debug/gpt2", overrides)[0][1]
    untried = {check["name"] for check in answer["checks"] if check["status"] == "missing"}
    assert untried == {"ports", "all-reduce"}


def test_a_folder_that_is_not_shared(ranks: Ranks, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ranks.run(2, WORK, "elsewhere", "debug/gpt2", [overrides[0], "run=tests/no-such-run"])
    found = failed(answers[0][1])
    assert (
        "what rank 0 writes there does not show here within 0.5 s; put the run on a file system" in found["run folder"]
    )
    assert found["run folder"].startswith(f"rank 1 on {HOST}: /tests/no-such-run")
    assert not (ROOT / "tests/no-such-run").exists()


def test_a_mistake_that_all_ranks_find_is_said_once(ranks: Ranks, overrides: list[str]) -> None:
    answers = ranks.run(3, WORK, "", "debug/gpt2", [*overrides, "parallel.tensor=2"])
    assert [code for code, _, _ in answers] == [1, 1, 1]
    found = failed(answers[0][1])
    assert list(found) == ["config"]
    assert found["config"].startswith("all 3 ranks: parallel: data=")
    assert "does not make the world of 3 processes" in found["config"]


def test_a_rank_that_does_not_come_is_named(ranks: Ranks) -> None:
    answers = ranks.run(3, WORK, "stuck", None, [], 2.0)
    said = [answer for _, answer, _ in answers if answer is not None]
    assert len(said) == 1, "one rank says it"
    assert failed(said[0])["ranks"].startswith(f"rank 2 on {HOST} does not come to versions within 2 s; see what")
    assert [code for code, _, _ in answers[:2]] == [1, 1]


def test_sixteen_thousand_ranks_with_one_fault_are_one_line() -> None:
    """Ranks sign one after the other; the last one knows the number of faults, and rank 0 reads two entries."""
    size, store = 16_384, HashStore()
    books = [RollCall(store, Place("torchrun", rank, size, rank % 8, 8, "n0", 1), 1.0) for rank in range(size)]
    for rank, book in enumerate(books):
        if rank % 8:
            book.report("versions", Fault("torch is 2.12.9, on rank 0 2.13.0", "install the same"))
        if rank == 77:
            book.report("versions", Fault("python is 3.10.1, on rank 0 3.11.7", "install the same"))
        book.sign("versions")
    assert books[0].read("versions/all") == "2"
    many, one = map(str, books[0].findings())
    assert many.startswith(
        f"rank 1 on {HOST}, rank 2 on {HOST}, rank 3 on {HOST}, rank 4 on {HOST} and 14332 more: torch"
    )
    assert one == f"rank 77 on {HOST}: python is 3.10.1, on rank 0 3.11.7"


def test_a_name_that_means_nothing_and_a_port_that_is_shut() -> None:
    place = Place("torchrun", 3, 4, 1, 2, "nowhere.invalid", 29500)
    with pytest.raises(RunError, match=r"rank 3 on \S+: nowhere.invalid has no address here: .*; set MASTER_ADDR"):
        check_names(place)
    with pytest.raises(
        RunError, match=r"127.0.0.1:\d+ is not reached within 0.3 s \(Connection refused\); start rank 0"
    ):
        _knock(place, "127.0.0.1", free_port(), 0.3)


@pytest.mark.parametrize(
    ("capability", "known", "runs"),
    [
        ((7, 5), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", True),  # a T4 under a CUDA 13 build
        ((7, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),  # a V100 there
        ((8, 9), "sm_80 sm_86 sm_90", True),  # an L4: binaries of its major version, not above its own
        ((8, 0), "sm_86 sm_90", False),
        ((12, 1), "sm_80 sm_90 compute_90", True),  # by the driver, from PTX
        ((8, 0), "compute_90", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100a compute_100a", False),
        ((10, 3), "sm_100f", True),
    ],
)
def test_cards_without_kernels(capability: tuple[int, int], known: str, runs: bool) -> None:
    assert has_kernels(capability, known.split()) is runs


@pytest.mark.in_turn
def test_by_launch_as_a_user_starts_it(overrides: list[str]) -> None:
    """Also that the text is one line each, and that the exit code reaches the launcher."""
    command = [sys.executable, "-m", "shardwright", "launch", "--doctor", "--nproc", "2", "debug/gpt2", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "train.device=cuda"], capture_output=True, text=True, timeout=120, env=environment)
    lines = done.stdout.splitlines()
    assert lines[0] == "ok      ranks       2 processes on 1 host, started by torchrun"
    (failed,) = [line for line in lines if line.startswith("failed")]
    assert failed.startswith("failed  device      all 2 ranks: train.device=cuda: this torch sees no GPU; use")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["shardwright: starting 2 processes"]


def test_one_process_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="doctor --cluster: this is one process; start it as the run is started"):
        doctor_cluster(None, [])
