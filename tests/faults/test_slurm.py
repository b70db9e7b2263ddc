"""A real SLURM of two nodes: a job that is interrupted in every way that clusters know, and one loss curve.

One job goes through all of it, and its curve and its data are those of the run that nothing happened to: preempted by a
job of a better partition (SIGTERM and a time of grace), put back into the queue (`scontrol requeue`), its time nearly
over (SIGUSR1), a node set down, a rank killed. Then every way in which a start may end, and whether another follows;
every command of docs/slurm.md; and srun by hand, where it contradicts itself.
"""

from __future__ import annotations

import datetime
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launcher.cli import run as command_line
from shardwright.launcher.slurm import Options, build_script
from shardwright.train.metrics import read_metrics
from tests import slurm_cluster
from tests.equivalence import work
from tests.faults.launched import HOLD, RECORDS, ROOT, recorded_sequences
from tests.faults.test_restart import check, run_config
from tests.slurm_cluster import Cluster, wait_for

STEPS = 12
REASON = slurm_cluster.why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes."""
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm"), 2) as built:
        yield built


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """The same run in one process, without SLURM."""
    run = tmp_path_factory.mktemp("one") / "run"
    work.run(run_config(prepared, run, STEPS), [])
    return run


class Job:
    """A run that `shardwright launch --slurm` submitted; cancelled at the end of `with`."""

    def __init__(self, cluster: Cluster, folder: Path, raw: dict[str, Any], *options: str, hold: tuple[int, ...] = ()):
        self.cluster, self.run, self.records_folder = cluster, Path(raw["run"]), folder / RECORDS
        self.records_folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(raw))
        words = [
            sys.executable,
            "-m",
            "tests.faults.recorded",
            "launch",
            "--slurm",
            *options,
            str(folder / "config.yaml"),
        ]
        variables = {HOLD: ",".join(map(str, hold)), "SHARDWRIGHT_TEST_RECORDS": str(self.records_folder)}
        self.words = cluster.run(*words, **variables).stdout
        self.number = self.words.split(" as job ")[1].split(";")[0]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.run("scancel", "--signal=KILL", "--full", self.number, check=False)
        self.cluster.run("scancel", self.number, check=False)
        wait_for(lambda: self.cluster.states() == {"idle"})

    @property
    def text(self) -> str:
        """All that its starts have printed."""
        log = self.run / "slurm" / f"{self.number}.out"
        return log.read_text(errors="replace") if log.exists() else ""

    def story(self) -> str:
        """For a failure."""
        return f"{self.cluster.job(self.number)}\n{self.text}\n{self.cluster.log()}"

    def wait_held(self, step: int) -> None:
        """Until both ranks wait after a step."""
        wait_for(lambda: len(list(self.records_folder.glob(f"held-{step}-*"))) == 2, tell=self.story)

    def release(self, step: int) -> None:
        """Let them go on."""
        (self.records_folder / f"go-{step}").touch()

    def wait_words(self, words: str) -> None:
        """Until its output has them."""
        wait_for(lambda: words in self.text, tell=self.story)

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl: the last record of each step."""
        return read_metrics(self.run)

    def sequences(self) -> dict[int, list[int]]:
        """Sequence numbers of each step."""
        return recorded_sequences(self.records_folder)

    def newest(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        latest = self.run / "checkpoints" / "latest"
        return int(latest.read_text().split("_")[1]) if latest.exists() else 0

    def rank_pid(self, rank: int) -> int:
        """The process of a rank."""
        for pid in self.cluster.net.pids(f"h{rank}"):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"tests.faults.recorded" in words and words[0].endswith(b"python"):
                return pid
        raise AssertionError(self.story())


# ------------------------------------------------------------------------------------------ interruptions


def preempt(job: Job, step: int) -> None:
    """A job of a better partition wants both nodes; SLURM gives this one a time of grace."""
    urgent = job.cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
                             "--output=/dev/null", "--wrap=true").stdout.strip()  # fmt: skip
    wait_for(lambda: "PreemptTime=2" in job.cluster.run("scontrol", "show", "job", job.number).stdout, tell=job.story)
    job.release(step)
    job.wait_words("back into the queue")
    wait_for(lambda: job.cluster.job(urgent)["JobState"] == "COMPLETED", tell=job.story)
    assert job.newest() > step


def requeue(job: Job, step: int) -> None:
    """An administrator, or a preemption without grace: SIGTERM, and SIGKILL after KillWait."""
    job.cluster.run("scontrol", "requeue", job.number)
    job.release(step)
    wait_for(lambda: job.newest() > step, tell=job.story)


def time_is_over(job: Job, step: int) -> None:
    """What SLURM does at --signal's time: SIGUSR1 to every rank."""
    job.cluster.run("scancel", "--signal=USR1", job.number)
    wait_for(lambda: job.text.count("SIGUSR1: finishing the step") == 1, tell=job.story)
    job.release(step)
    wait_for(lambda: job.newest() > step, tell=job.story)


def node_down(job: Job, step: int) -> None:
    """One of its nodes is lost, and comes back a little later."""
    job.cluster.run("scontrol", "update", "nodename=h1", "state=down", "reason=test")
    job.release(step)
    wait_for(lambda: job.cluster.job(job.number)["JobState"] == "PENDING", tell=job.story)
    assert "down" in job.cluster.states()
    job.cluster.run("scontrol", "update", "nodename=h1", "state=resume")


def kill_rank(job: Job, step: int) -> None:
    """kill -9 of one rank: the job starts the others and it again where it is."""
    os.kill(job.rank_pid(1), signal.SIGKILL)
    job.release(step)
    job.wait_words("; starting again from step_")


FAULTS = {"preempted": preempt, "requeued": requeue, "time": time_is_over, "node": node_down, "rank": kill_rank}
# Each costs 10 s: in continuous integration two and another one every day, elsewhere one.
DAY = datetime.date.today().toordinal()
CHOSEN = [list(FAULTS)[DAY % len(FAULTS)]]
if os.environ.get("CI"):
    CHOSEN = ["requeued", "node", ("preempted", "time", "rank")[DAY % 3]]


def test_one_curve_whatever_comes(cluster, prepared, uninterrupted, tmp_path):
    raw = run_config(prepared, tmp_path / "run", STEPS)
    raw["train"]["device"] = "cpu"
    hold = tuple(range(2, 2 + 2 * len(CHOSEN), 2))
    with Job(cluster, tmp_path, raw, "--nodes=2", "--nproc=1", "--time=30", "--restarts=1", hold=hold) as job:
        for step, name in zip(hold, CHOSEN, strict=True):
            job.wait_held(step)
            FAULTS[name](job, step)
        ended = cluster.wait_ended(job.number, job.story)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.story()
        assert int(ended["Restarts"]) == len([name for name in CHOSEN if name != "rank"]), job.story()
        check(job, uninterrupted, STEPS)


# ------------------------------------------------------------------------------------------ whether to start again

#: Plays the Python of a job: ends as the next line of <run>/plan says, with a new checkpoint where that ends in +, and
#: saves and leaves with 75 at a signal. What real ranks do is tested above; these are many starts in little time.
STAND_IN = """\
#!/usr/bin/env bash
nap() { for ((i = 0; i < 1200; i++)); do sleep 0.1; done; }
trap 'exit 75' TERM USR1
if ((SLURM_PROCID)); then nap; fi  # the first task plays for all of them
run=${!#}; run=${run#run=}; mkdir -p "$run/checkpoints"
echo >> "$run/starts"; number=$(wc -l < "$run/starts"); line=$(sed -n "${number}p" "$run/plan")
save() { printf "step_%08d\\n" "$number" > "$run/checkpoints/latest"; }
trap 'save; exit 75' TERM USR1
if [[ $line == wait ]]; then nap; fi
if [[ $line == *+ ]]; then save; fi
exit "${line%+}"
"""

#: How its starts end -> state, exit code, times it was requeued, starts.
ENDS = {
    "done, in 'a b'$(touch x)#%j": (["0"], ("COMPLETED", "0:0", 0, 1)),
    "a mistake": (["2"], ("FAILED", "2:0", 0, 1)),
    "a rank is killed": (["137", "0"], ("COMPLETED", "0:0", 0, 2)),
    "fails twice at one place": (["1", "1", "0"], ("FAILED", "1:0", 0, 2)),
    "fails and gets on": (["1+", "1+", "1+", "0"], ("FAILED", "1:0", 0, 3)),
    "its time is too short": (["75"], ("FAILED", "75:0", 0, 1)),
    "cancelled": (["wait"], ("CANCELLED", "75:0", 0, 1)),
}


def stand_in(folder: Path) -> str:
    """Its path."""
    path = folder / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def planned(folder: Path, plan: list[str]) -> Path:
    """A run folder in which it finds a plan."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "plan").write_text("\n".join(plan) + "\n")
    return folder


def starts(run: Path) -> int:
    """How often a job was started."""
    return len((run / "starts").read_text()) if (run / "starts").exists() else 0


def test_what_is_started_again(cluster, tmp_path):
    """The jobs run side by side."""
    python, jobs = stand_in(tmp_path), {}
    for name, (plan, _) in ENDS.items():
        run = planned(tmp_path / name, plan)
        options = Options(processes=1, python=python, restarts=2)
        script = build_script("debug/gpt2", ["train.device=cpu", f"run={run}"], options)
        (run / "job").write_text(script)
        jobs[name] = cluster.run("sbatch", "--parsable", str(run / "job")).stdout.strip()
    wait_for(lambda: starts(tmp_path / "cancelled"), tell=cluster.log)
    cluster.run("scancel", jobs["cancelled"])
    for name, (_, expected) in ENDS.items():
        known, run = cluster.wait_ended(jobs[name], cluster.log), tmp_path / name
        output = (run / "slurm" / f"{jobs[name]}.out").read_text()
        found = known["JobState"], known["ExitCode"], int(known["Restarts"]), starts(run)
        assert found == expected, (name, output, cluster.log())
    assert (tmp_path / "cancelled" / "checkpoints" / "latest").exists()


# ------------------------------------------------------------------------------------------ the page


def page_commands() -> list[str]:
    """Every `$ ...` line of docs/slurm.md, comments left out."""
    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line[2:].partition("  #")[0].strip() for line in blocks.splitlines() if line.startswith("$ ")]


class Page:
    """Runs the page's lines one after the other, with 1 in place of 8 processes a node and a small config."""

    def __init__(self, cluster: Cluster, folder: Path, capsys: Any) -> None:
        self.cluster, self.folder, self.capsys, self.run = (
            cluster,
            folder,
            capsys,
            planned(folder / "run", ["wait"] * 3),
        )
        self.job = "none yet"

    def do(self, line: str) -> None:
        """One line; AssertionError where it fails or does not do what the page says."""
        words = shlex.split(line.replace("1234", self.job).replace("-per-node 8", "-per-node 1"))
        if words[0] == "shardwright":
            self.launch(["1" if w == "8" else w for w in words[1:]])
        elif words[0] == "sbatch":
            self.job = self.cluster.run(*words, folder=self.folder).stdout.split()[-1]
            self.wait_starts(1)
        elif words[0] == "srun":
            self.train([sys.executable if w == "shardwright" else w for w in words])
        else:
            before = starts(self.run)
            said = self.cluster.run(*words).stdout
            if words[0] == "squeue":
                assert self.job in said
            elif words[:-1] == ["scancel"]:
                assert self.cluster.wait_ended(self.job)["JobState"] == "CANCELLED"
            else:
                self.wait_starts(before + 1)

    def launch(self, words: list[str]) -> None:
        """Submitted, seen in the queue and taken out; or printed, with a stand-in for the program."""
        *words, mark, target = words if ">" in words else [*words, "", ""]
        assert command_line(words) == 0
        output = self.capsys.readouterr().out
        if mark:
            run = f"run={self.run}"
            script = output.replace(sys.executable, stand_in(self.folder)).replace(
                "english.yaml)", f"english.yaml {run})"
            )
            (self.folder / target).write_text(script.replace(str(self.folder / "runs/english"), str(self.run)))
        else:
            number = output.split(" as job ")[1].split(";")[0]
            assert self.cluster.job(number)["JobName"] in ("english", "two")
            self.cluster.run("scancel", number)

    def train(self, words: list[str]) -> None:
        """Real ranks, to the end of a run."""
        at = words.index(sys.executable) + 1
        self.cluster.run(*words[:at], "-m", "shardwright", *words[at:], folder=self.folder)
        assert max(r["step"] for r in read_metrics(self.folder / "runs" / "english")) == 6

    def wait_starts(self, number: int) -> None:
        """Until the job has been started so often."""
        wait_for(lambda: starts(self.run) == number, tell=self.cluster.log)


def test_every_command_of_the_page(cluster, prepared, tmp_path, monkeypatch, capsys):
    raw = run_config(prepared, tmp_path / "unused", 6)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "english.yaml").write_text(yaml.safe_dump({k: v for k, v in raw.items() if k != "run"}))
    tools = tmp_path / "tools"
    tools.mkdir()
    there = shlex.join(cluster.net.named("login", str(shutil.which("sbatch"))))
    (tools / "sbatch").write_text(f'#!/bin/sh\nexec {there} "$@"\n')
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    for name in ("SLURM_CONF", "PYTHONPATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.chdir(tmp_path)
    page, lines = Page(cluster, tmp_path, capsys), page_commands()
    assert len(lines) >= 9
    for line in lines:
        page.do(line)


# ------------------------------------------------------------------------------------------ srun by hand


def test_srun_that_contradicts_itself(cluster, prepared, tmp_path):
    """What would train alone, or as several worlds, is refused with the reason."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(prepared, tmp_path / "run")))
    train = [sys.executable, "-m", "shardwright", "train", str(path)]
    alone = cluster.run("salloc", "--nodes=2", "--ntasks-per-node=1", *train, check=False)
    assert "SLURM_NTASKS=2: the job has 2 tasks, but this process was started beside them" in alone.stderr
    others = ["env", "RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0"]
    islands = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *others, *train, check=False)
    assert "two launchers: RANK and WORLD_SIZE says rank 0 of 1, srun says rank 1 of 2" in islands.stderr
    assert (alone.returncode, islands.returncode) == (2, 2) and not (tmp_path / "run").exists()
