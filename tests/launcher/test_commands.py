"""The commands of the pages on launchers, as they stand there, run for real.

A tiny config takes the place of theirs, two processes that of theirs, and a new folder that of the run. A command that
takes several hosts is named in ELSEWHERE with the test that runs it, which asks for its words by `command_of` where no
fault is planted in it; a new one on a page is run by itself.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

from tests.equivalence.cells import config
from tests.ranks import VARIABLES, free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("single-device", "torchrun", "launch", "deepspeed", "accelerate")
ELSEWHERE = {
    "torchrun --nnodes 2 --node-rank": "tests/faults/test_hosts.py::test_torchrun_finds_the_interface",
    "torchrun --nnodes 2 --nproc-per-node": "tests/faults/test_hosts.py::test_four_hosts_by_torchrun",
    "deepspeed --hostfile hosts --module": "tests/faults/test_hosts.py::test_deepspeed_with_a_hostfile",
    "deepspeed --hostfile hosts --no_ssh": "tests/faults/test_hosts.py::test_deepspeed_with_a_hostfile",
    "mpirun -n 8 --hostfile": "tests/faults/test_hosts.py::test_mpirun_with_a_hostfile",
    "shardwright import --deepspeed": "tests/train/engines/test_import.py::test_a_deepspeed_folder_becomes_a_run",
    "shardwright launch --doctor --hosts": "tests/faults/test_cluster_hosts.py::test_launch_doctor_over_ssh",
    "shardwright launch --hosts hosts configs": "tests/faults/test_hosts.py::test_over_ssh_and_the_connection_dies",
    "shardwright launch --hosts hosts --min-nodes": "tests/faults/test_elastic.py::test_four_then_two_then_four",
}
#: Options whose number of processes is made 2.
PROCESSES = ("--nproc", "--nproc-per-node", "--num_gpus", "--num_processes", "-n")
CONFIGS = ("configs/english.yaml", "colab")
#: How a program of a page is run from this environment, whatever is on the path.
MODULES = {
    "shardwright": ["-m", "shardwright"],
    "torchrun": ["-m", "torch.distributed.run"],
    "deepspeed": ["-m", "deepspeed.launcher.runner"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}


def commands(page: str) -> list[str]:
    """Lines of a page's console blocks."""
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.S)
    return [line[2:] for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]


CASES = [(page, command) for page in PAGES for command in commands(page)]


def command_of(page: str, start: str, changes: Mapping[str, str]) -> list[str]:
    """Words of the one command of a page that begins so, with other words in the place of some; run from here.

    AssertionError where the page has it no more, or not as it is to be changed.
    """
    (line,) = [command for command in commands(page) if command.startswith(start)]
    for old, new in changes.items():
        parts = re.split(rf"(?<![\w./-]){re.escape(old)}(?![\w./-])", line)
        assert len(parts) > 1, f"{old!r} is not in: {line}"
        line = new.join(parts)
    program, *words = shlex.split(line, comments=True)
    return [sys.executable, *MODULES[program], *words] if program in MODULES else [program, *words]


def is_there(test: str) -> bool:
    """Whether a file has a test of that name."""
    file, _, name = test.partition("::")
    return (ROOT / file).is_file() and f"\ndef {name}(" in (ROOT / file).read_text("utf-8")


def tiny(words: list[str], folder: Path, prepared: Path) -> list[str]:
    """A command's words with what is too large for a test made small."""
    raw = config(prepared, folder / "run")
    raw["train"] |= {"steps": 2}
    raw["schedule"] = {"warmup_steps": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    (folder / "hosts").write_text("localhost slots=2\n")
    found = []
    for before, word in zip(["", *words], words, strict=False):
        if before in PROCESSES:
            word = "2"
        elif word in CONFIGS:
            word = str(folder / "config.yaml")
        elif word.startswith("run="):
            word = f"run={folder / 'run'}"
        elif word == "hosts":
            word = str(folder / "hosts")
        found.append(word)
    return found


def has_extra(text: str) -> bool:
    """Whether `pip install 'shardwright[EXTRA]'` names an extra that there is."""
    (extra,) = re.findall(r"shardwright\[(\w+)\]", text)
    return extra in (metadata("shardwright").get_all("Provides-Extra") or [])


@pytest.mark.in_turn
@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{page}-{command[:60]}" for page, command in CASES])
def test_a_command_of_a_page(page, command, bundled, prepared, tmp_path):
    known = [test for words, test in ELSEWHERE.items() if command.startswith(words)]
    if known:
        assert is_there(known[0])
        pytest.skip(f"run by {known[0]}")
    program, *words = shlex.split(command, comments=True)
    if program == "pip":
        assert has_extra(command)
        return
    if program == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: apt-get install openmpi-bin)")
    if program in ("deepspeed", "accelerate"):
        pytest.importorskip(program, reason=f"{program} is not installed: pip install 'shardwright[{program}]'")
    if words[0] == "prepare":
        words = [
            "prepare",
            str(bundled / "english.jsonl"),
            "--output",
            str(tmp_path / "data"),
            "tokenizer.vocab_size=512",
        ]
    else:
        words = tiny(words, tmp_path, prepared)
    if program == "mpirun":
        own = words.index("shardwright")
        words = ["--oversubscribe", "--allow-run-as-root", *words[:own], sys.executable, "-m", *words[own:]]
    start = [program] if program == "mpirun" else [sys.executable, *MODULES[program]]
    port = {"accelerate": ["--main_process_port", str(free_port())], "deepspeed": ["--master_port", str(free_port())]}
    if program == "accelerate":
        words = [words[0], *port[program], *words[1:]]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *(port[program] if program == "deepspeed" else []), *words],
        capture_output=True, text=True, env=environment, timeout=240, stdin=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    several = program != "shardwright" or words[0] == "launch"
    assert not several or re.search("2 processes(,| on) ", done.stdout + done.stderr), done.stdout + done.stderr
