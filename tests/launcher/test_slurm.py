"""The batch script of `launch --slurm`: what it asks for, what is refused; and no word of a config is code in it."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.config import ConfigError, RunError
from shardwright.launcher.cli import run
from shardwright.launcher.slurm import Options, build_script, submit, time_limit

CONFIG = "debug/gpt2"
CPU = ["train.device=cpu"]


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def command(script: str) -> list[str]:
    """The words of the command, as bash reads them."""
    begin = script.index("cd -- ")
    until = script.index("\ncheckpoints=")
    lines = script[begin:until].partition("\n")[2]
    show = f'{lines}\nprintf "%s\\0" "${{command[@]}}"'
    return subprocess.run(["bash", "-c", show], capture_output=True, check=True).stdout.decode().split("\0")[:-1]


def test_what_it_asks_for(tmp_path):
    options = Options(nodes=2, processes=4, time="2-12", partition="gpu", account="me", grace="2m",
                      settings=["cpus-per-task=8", "exclusive"])  # fmt: skip
    script = build_script(CONFIG, ["parallel.tensor=2"], options)
    assert directives(script) == [
        "job-name=debug-gpt2", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=2-12", "partition=gpu",
        "account=me", "cpus-per-task=8", "exclusive", f"output={tmp_path}/runs/debug-gpt2/slurm/%j.out",
        "open-mode=append", "signal=USR1@120", "requeue",
    ]  # fmt: skip
    assert "srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=8 " in script
    assert command(script) == [sys.executable, "-m", "shardwright", "train", CONFIG, "parallel.tensor=2"]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_who_asks_for_gpus():
    assert "gpus-per-node=2" in directives(build_script(CONFIG, [], Options(processes=2)))
    assert not any(line.startswith("gpu") for line in directives(build_script(CONFIG, CPU, Options(processes=2))))
    chosen = directives(build_script(CONFIG, [], Options(processes=2, settings=["gres=gpu:a100:2"])))
    assert [line for line in chosen if line.startswith(("gpu", "gres"))] == ["gres=gpu:a100:2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(), "needs --nproc"),
        (Options(nodes=3, processes=1), "--nodes 3 --nproc 1: "),
        (Options(processes=1, grace="soon"), "--grace soon"),
        (Options(processes=1, grace="2d"), "takes up to 65535 s"),
        (Options(processes=1, time="10h"), "--time '10h': expected minutes"),
        (Options(processes=1, time="0:30"), "is not longer than --grace"),
        (Options(processes=1, partition="gpu; rm"), "--partition 'gpu; rm': is no such name"),
        (Options(processes=1, account="a\nb"), "--account"),
        (Options(processes=1, settings=["nodes=4"]), "--sbatch nodes=4: is not free under launch; use --nodes"),
        (Options(processes=1, settings=["--signal=B:TERM@1"]), "use --grace"),
        (Options(processes=1, settings=["gpus-per-task=1"]), "use gpus-per-node=N"),
        (Options(processes=1, settings=["-N=4"]), "expected key=value"),
        (Options(processes=1, settings=["qos="]), "expected key=value"),
        (Options(processes=1, settings=["comment=a\n#SBATCH --nodes=9"]), "expected key=value"),
        (Options(processes=1, python="a\rb"), "cannot be printed"),
    ],
)
def test_what_is_refused(options, words):
    """In one line, before anything is written."""
    with pytest.raises(ConfigError, match=words) as refused:
        build_script(CONFIG, [*CPU, "parallel.tensor=2"] if options.nodes == 3 else CPU, options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-12", 216000), ("1-0:30", 88200), ("1-1:1:1", 90061),
     ("UNLIMITED", math.inf)],
)  # fmt: skip
def test_times_are_those_of_sbatch(text, seconds):
    assert time_limit(text) == seconds


HOSTILE = st.text(st.characters(blacklist_categories=["C", "Z"], blacklist_characters="/"), min_size=1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=HOSTILE.map(lambda text: f"x{text}"[:60]))
def test_no_word_of_a_config_is_code(name, tmp_path):
    """Run folders and overrides that are full of quotes, $(...) and # come out as they went in."""
    run = f"{tmp_path}/'; touch x; $(touch x) `touch x`\"{name}".replace("\\", "")
    overrides = [*CPU, f"run={json.dumps(run, ensure_ascii=False)}"]
    script = build_script(CONFIG, overrides, Options(processes=1))
    assert command(script)[-1] == overrides[-1] and not Path("x").exists()
    assert all(line.isprintable() for line in directives(script)) and len(directives(script)) == 7


def test_the_folder_is_quoted(tmp_path, monkeypatch):
    place = tmp_path / "a b$(touch x)'#"
    place.mkdir()
    monkeypatch.chdir(place)
    script = build_script(CONFIG, CPU, Options(processes=1))
    line = next(line for line in script.splitlines() if line.startswith("cd -- "))
    assert shlex.split(line)[:3] == ["cd", "--", str(place)]
    output = next(line for line in directives(script) if line.startswith("output="))
    assert output == f'output="{place}/runs/debug-gpt2/slurm/%j.out"'


def test_a_backslash_is_refused():
    with pytest.raises(ConfigError, match="a path that has a backslash"):
        build_script(CONFIG, [*CPU, "run=a\\b"], Options(processes=1))


def test_without_sbatch_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch: is not here"):
        submit(CONFIG, CPU, Options(processes=1))
    assert list(tmp_path.iterdir()) == []


def test_what_sbatch_says_is_told(monkeypatch, tmp_path):
    """An sbatch of the test's own, which refuses; that of the job that this one may run in is not told of it."""
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/sh\necho "sbatch: error: $SLURM_CPU_BIND$SLURM_CONF no such partition" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_CPU_BIND", "cores")
    monkeypatch.setenv("SLURM_CONF", "(conf)")
    with pytest.raises(RunError, match=r"job.sbatch: sbatch: error: \(conf\) no such partition"):
        submit(CONFIG, CPU, Options(processes=1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time", "1"], "--time: does not go with a start here or over ssh; it is for --slurm"),
        (["--print"], "--print: does not go with a start here or over ssh; it is for --slurm"),
        (
            ["--slurm", "--nproc", "1", "--hosts", "x"],
            "--hosts: does not go with --slurm; it is for a start",
        ),
        (["--slurm", "--nproc", "1", "--min-nodes", "1"], "--min-nodes: does not go with --slurm"),
    ],
)
def test_options_of_another_launcher(words, said, capsys):
    assert run(["launch", *words, CONFIG]) == 2
    assert capsys.readouterr().err.startswith(f"shardwright: {said}")


def test_printed_is_what_would_be_submitted(capsys, tmp_path):
    assert run(["launch", "--slurm", "--print", "--nproc", "2", CONFIG, *CPU]) == 0
    assert capsys.readouterr().out == build_script(CONFIG, CPU, Options(processes=2))
    assert list(tmp_path.iterdir()) == []
