"""`shardwright launch --slurm`: a batch script that trains on a SLURM cluster, and goes on by itself.

Under cli.py, beside supervise.py, which it does not use: in the script srun starts one task for each process, and each
enters the world by itself (world.py reads srun's variables). So SLURM places, binds, accounts for and ends every rank,
it finds a lost node itself, and it has the nodes to put in its place; a supervisor inside of the allocation would be a
second opinion on all of that, and could only go on with fewer nodes than are paid for. What is left to decide when
ranks end is the loop at the end of the script. Nothing of a config gets into it but quoted words.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright.config import Config, ConfigError, RunError, parse_duration
from shardwright.launcher import launch
from shardwright.train.folder import CHECKPOINTS
from shardwright.train.settings import read_config

FOLDER, SCRIPT = "slurm", "job.sbatch"  # below the run folder; the logs lie beside it
MOST_GRACE_S = 65535  # of sbatch's --signal
#: Directives that belong to an option of this command, or to the way the script works.
TAKEN = {
    "nodes": "use --nodes", "ntasks": "use --nodes and --nproc", "ntasks-per-node": "use --nproc", "time": "use --time",
    "partition": "use --partition", "account": "use --account", "signal": "use --grace",
    "requeue": "the script has it", "no-requeue": "take the script by --print and change it",
    "no-kill": "without all of its nodes a run cannot go on", "output": "it lies in the run folder",
    "open-mode": "all starts share one output", "chdir": "start this in the folder in which the run is to work",
    "gpus-per-task": "use gpus-per-node=N, as a rank takes the GPU of its number on the node",
    "array": "use one launch for each run", "wrap": "the job is the script", "parsable": "use --print",
    "test-only": "use --print",
}  # fmt: skip
_KEY, _NAME = re.compile(r"[a-z][a-z0-9-]*"), re.compile(r"[\w.@:+,-]+")
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
_PLAIN = re.compile(r"[\w.,:=@%+/-]+")
#: Of the job or shell that this command runs in. sbatch would hand them on, and srun would take them for its own.
_OWN = re.compile(r"(SLURM|SRUN)_(?!CONF$|JWT$|CLUSTERS$|DEBUG)")


@dataclass(frozen=True)
class Options:
    """What the command line says beside the config."""

    nodes: int = 1
    processes: int | None = None  # of each node
    time: str | None = None  # as sbatch takes it
    partition: str | None = None
    account: str | None = None
    settings: Sequence[str] = ()  # further directives, as key=value or key
    grace: str = "60s"
    restarts: int = 3
    python: str = sys.executable


def submit(config: str, overrides: Sequence[str], options: Options, *, only_print: bool = False) -> int:
    """Write the batch script of a run and submit it, or print it; the exit code. ConfigError before either."""
    resolved = read_config(config, overrides)
    script = build_script(config, overrides, options, resolved)
    if only_print:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: is not here; start this on a login node of the cluster, or take the script by --print"
        )
    path = _folder(resolved) / SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)  # the job's log goes there, and SLURM makes no folders
    path.write_text(script, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not _OWN.match(name)}
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RunError(f"{path}: {done.stderr.strip() or f'sbatch ended with {done.returncode}'}")
    job = done.stdout.strip().partition(";")[0]
    print(f"submitted {path} as job {job}; its output: {path.with_name(f'{job}.out')}; to end it: scancel {job}")
    return 0


def build_script(config: str, overrides: Sequence[str], options: Options, resolved: Config | None = None) -> str:
    """The batch script, as text; ConfigError names the option or the key that is wrong."""
    resolved = read_config(config, overrides) if resolved is None else resolved
    processes = _processes(options, resolved)
    directives = [_directive(key, value) for key, value in _directives(options, processes, resolved)]
    command = [options.python, "-m", launch.MODULE, "train", config, *overrides]
    for word in (*command, os.getcwd(), str(_folder(resolved))):
        if not word.isprintable():
            raise ConfigError(f"{word!r}: has a character that cannot be printed; put the setting into the config file")
    if "\\" in str(_folder(resolved)):
        raise ConfigError(f"run={resolved.run}: sbatch fills no job number into a path that has a backslash; rename it")
    values = {
        "directives": "\n".join(directives),
        "folder": shlex.quote(os.getcwd()),
        "command": shlex.join(command),
        "checkpoints": shlex.quote(str(_folder(resolved).parent / CHECKPOINTS)),
        "srun": shlex.join(_srun(options, processes)),
        "restarts": str(options.restarts),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], TEMPLATE)


def _folder(config: Config) -> Path:
    return Path(config.run or "").absolute() / FOLDER


def _processes(options: Options, config: Config) -> int:
    """Of each node; ConfigError where it is not known or does not fit the layout."""
    if options.processes is None:
        raise ConfigError("--slurm: needs --nproc, the processes of each node (its GPUs), which cannot be counted here")
    why = launch.why_not(config, options.nodes * options.processes)
    if why is not None:
        raise ConfigError(f"--nodes {options.nodes} --nproc {options.processes}: {why}")
    return options.processes


def _directives(options: Options, processes: int, config: Config) -> Iterator[tuple[str, str | None]]:
    """Options of sbatch in the order in which they are read."""
    grace = _grace(options)
    given = dict(_parse(setting) for setting in options.settings)
    folder = _folder(config)
    yield "job-name", given.pop("job-name", None) or re.sub(r"[^\w.+-]+", "_", folder.parent.name) or "shardwright"
    yield "nodes", str(options.nodes)
    yield "ntasks-per-node", str(processes)
    if config.train.device != "cpu" and not any(key.startswith(("gpus", "gres")) for key in given):
        yield "gpus-per-node", str(processes)
    for key, value in (("time", options.time), ("partition", options.partition), ("account", options.account)):
        if value is not None:
            yield key, value
    yield from given.items()
    yield "output", str(folder).replace("%", "%%") + "/%j.out"
    yield "open-mode", "append"
    yield "signal", f"USR1@{grace}"
    yield "requeue", None


def _grace(options: Options) -> int:
    """Seconds between the request to save and the end of the time; ConfigError for wrong names and times as well."""
    for option, name in (("--partition", options.partition), ("--account", options.account)):
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigError(f"{option} {name!r}: is no such name; expected letters, digits and _ . - +")
    try:
        grace = math.ceil(parse_duration(options.grace))
    except ValueError as error:
        raise ConfigError(f"--grace {options.grace}: {error}") from None
    if grace > MOST_GRACE_S:
        raise ConfigError(f"--grace {options.grace}: sbatch takes up to {MOST_GRACE_S} s")
    if options.time is not None and time_limit(options.time) <= grace:
        raise ConfigError(f"--time {options.time}: is not longer than --grace {options.grace}, which is for saving")
    return grace


def time_limit(text: str) -> float:
    """Seconds of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; without end for `UNLIMITED`."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"--time {text!r}: expected minutes, H:M:S, D-H or D-H:M:S, as 90, 12:00:00 or 2-12")
    first, second, third = (int(match[name] or 0) for name in "abc")
    if match["d"] is not None:
        return int(match["d"]) * 86400 + first * 3600 + second * 60 + third
    if match["c"] is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + second


def _parse(setting: str) -> tuple[str, str | None]:
    """A directive of --sbatch; ConfigError where it is none, or one that belongs to something else."""
    key, equals, value = setting.removeprefix("--").partition("=")
    if not _KEY.fullmatch(key) or not value.isprintable() or (equals and not value):
        raise ConfigError(f"--sbatch {setting!r}: expected key=value or key, one long option of sbatch, as qos=high")
    if key in TAKEN:
        raise ConfigError(f"--sbatch {setting}: is not free under launch; {TAKEN[key]}")
    return key, value if equals else None


def _directive(key: str, value: str | None) -> str:
    """One line for sbatch, which takes blanks and # in double quotes only, and a backslash there before a quote."""
    if value is None:
        return f"#SBATCH --{key}"
    if not _PLAIN.fullmatch(value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{key}={value}"


def _srun(options: Options, processes: int) -> list[str]:
    """srun and its options. Since 22.05 it does not take --cpus-per-task from the job."""
    cpus = dict(_parse(setting) for setting in options.settings).get("cpus-per-task")
    world = [f"--nodes={options.nodes}", f"--ntasks={options.nodes * processes}", f"--ntasks-per-node={processes}"]
    return ["srun", *world, *([f"--cpus-per-task={cpus}"] if cpus else []), "--kill-on-bad-exit=0",
            f"--wait={_grace(options)}"]  # fmt: skip


TEMPLATE = r"""#!/usr/bin/env bash
# Written by `shardwright launch --slurm`. Submit it again at any time: a run goes on from its newest checkpoint.
@directives@
# signal: so many seconds before the time is over, SLURM has every rank finish its step, save and leave with 75.
# requeue: after a preemption and after the loss of a node, SLURM puts the job back into the queue.

cd -- @folder@ || exit 1
command=(@command@)
checkpoints=@checkpoints@

newest() { cat -- "$checkpoints/latest" 2>/dev/null; }
state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T; }
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; }
say() { echo "shardwright: job $SLURM_JOB_ID: $*" >&2; }

# A SIGTERM is for the ranks, which save at it. srun would kill them at once, so it is put out of the way, into a
# process group of its own; the shell stays to look at how they end.
set -m
trap '' TERM

failed_at="none yet"
for ((restarts = 0; ; restarts++)); do
    before=$(newest)
    # When a rank is gone, the others say which one before they end.
    @srun@ "${command[@]}"
    code=$?
    if ((code == 0 || code == 2)); then  # done, or a mistake in the config, which is not repeated
        exit $code
    fi
    if [[ $(state) != RUNNING ]]; then  # cancelled, requeued, a node is lost: SLURM has decided what follows
        exit $code
    fi
    if preempted || { ((code == 75)) && [[ $(newest) != "$before" ]]; }; then
        say "stopped at $(newest || echo "no checkpoint"); back into the queue, to go on from there"
        scontrol requeue "$SLURM_JOB_ID"
        exit 75
    fi
    if ((code == 75)); then
        say "stopped before anything new was saved; not requeued, as it would come to the same again"
        exit 75
    fi
    if [[ $(newest) == "$failed_at" ]]; then
        say "failed twice and saved nothing in between; not started again"
        exit $code
    fi
    if ((restarts >= @restarts@)); then
        say "given up after $restarts restarts; the same script goes on from the newest checkpoint"
        exit $code
    fi
    failed_at=$(newest)
    say "failed with exit code $code; starting again from ${failed_at:-the beginning}"
done
"""
