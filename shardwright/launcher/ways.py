"""`shardwright launch`: one command, and a file for each way to launch.

Under cli.py. launch.py starts a run here or over ssh and supervises it; slurm.py, kubernetes.py and sky.py write what
those systems read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwright.config import ConfigError
from shardwright.launcher.arguments import ConfigName, Overrides

HERE, SLURM, KUBERNETES, SKY = "a start here or over ssh", "--slurm", "--kubernetes", "--sky"
#: Ways to launch, with the options that they alone have, by their names in Python.
WAYS = {
    HERE: {"nproc", "hosts", "min_nodes", "grace", "lost_after", "rejoin", "wait", "env", "python", "ssh", "doctor"},
    SLURM: {"nproc", "nodes", "grace", "python", "only_print", "time", "partition", "account", "sbatch"},
    KUBERNETES: {"nproc", "nodes", "env", "image", "claim", "secret", "output"},
    SKY: {"nodes", "env", "image", "storage", "cloud", "gpus", "spot", "secret", "output"},
}
HOSTS_PANEL, BATCH_PANEL, MANIFEST_PANEL = "Here and over ssh", "SLURM", "Kubernetes and clouds"


def _option(panel: str, help_: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, **more)


def launch(
    context: typer.Context,
    config: ConfigName,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes of each host; default its GPUs, else 1")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes under SLURM or of a manifest, each with --nproc")] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="Starts after a loss, from the newest checkpoint")] = 3,
    grace: Annotated[str, typer.Option(help="After a signal: time to finish the step and save")] = "60s",
    env: Annotated[list[str] | None, typer.Option(help="Variable to hand to the other hosts; repeat")] = None,
    python: Annotated[str, typer.Option(help="Python on the other hosts", show_default="this one")] = sys.executable,
    hosts: Annotated[
        Path | None, _option(HOSTS_PANEL, "Hosts to use over ssh: a line each, NAME slots=N", metavar="FILE")
    ] = None,
    min_nodes: Annotated[int | None, _option(HOSTS_PANEL, "Go on with so many hosts after a loss; default all")] = None,
    lost_after: Annotated[str, _option(HOSTS_PANEL, "A host that says nothing for so long is lost")] = "30s",
    rejoin: Annotated[str, _option(HOSTS_PANEL, "How often to look whether a lost host is back; or never")] = "5m",
    wait: Annotated[str, _option(HOSTS_PANEL, "How long to wait for hosts where fewer than needed are left")] = "10m",
    ssh: Annotated[str | None, _option(HOSTS_PANEL, "ssh program and its options", show_default="ssh")] = None,
    doctor: Annotated[bool, _option(HOSTS_PANEL, "Only look whether the run could start there", "--doctor")] = False,
    slurm: Annotated[bool, _option(BATCH_PANEL, "Write a batch script and submit it", "--slurm")] = False,
    only_print: Annotated[bool, _option(BATCH_PANEL, "Print the script instead", "--print")] = False,
    time: Annotated[str | None, _option(BATCH_PANEL, "Time limit, as 12:00:00 or 2-12")] = None,
    partition: Annotated[str | None, _option(BATCH_PANEL, "Where to queue")] = None,
    account: Annotated[str | None, _option(BATCH_PANEL, "Who pays")] = None,
    sbatch: Annotated[
        list[str] | None, _option(BATCH_PANEL, "One more option of sbatch; repeat", metavar="KEY=VALUE")
    ] = None,
    kubernetes: Annotated[
        bool, _option(MANIFEST_PANEL, "Print a Kubeflow TrainJob, start nothing", KUBERNETES)
    ] = False,
    sky: Annotated[bool, _option(MANIFEST_PANEL, "Print a SkyPilot task", SKY)] = False,
    image: Annotated[str | None, _option(MANIFEST_PANEL, "Container image with shardwright")] = None,
    secret: Annotated[list[str] | None, _option(MANIFEST_PANEL, "A secret by name; repeat")] = None,
    output: Annotated[Path | None, _option(MANIFEST_PANEL, "File to write", "--output", "-o")] = None,
    claim: Annotated[str | None, _option(MANIFEST_PANEL, "Kubernetes: volume claim for data and runs")] = None,
    storage: Annotated[str | None, _option(MANIFEST_PANEL, "SkyPilot: s3://..., gs://..., volume:NAME, ...")] = None,
    cloud: Annotated[str | None, _option(MANIFEST_PANEL, "SkyPilot: aws, azure or gcp; default the cheapest")] = None,
    gpus: Annotated[str | None, _option(MANIFEST_PANEL, "SkyPilot: of each node, such as A100:8")] = None,
    spot: Annotated[bool, _option(MANIFEST_PANEL, "SkyPilot: machines that may be taken away", "--spot")] = False,
) -> None:
    """Train in several processes: here, on hosts, under SLURM or in a cloud; start again when one is lost."""
    way = _choose({SLURM: slurm, KUBERNETES: kubernetes, SKY: sky})
    _refuse_strangers(context, way)
    settings = overrides or ()

    def start_here() -> int:
        from shardwright.launcher.launch import Options
        from shardwright.launcher.launch import launch as start

        options = Options(
            processes=nproc, hosts=hosts, min_hosts=min_nodes, restarts=restarts, grace=grace, lost_after=lost_after,
            rejoin=rejoin, wait=wait, pass_on=env or (), python=python, ssh=ssh, doctor=doctor,
        )  # fmt: skip
        return start(config, settings, options)

    def start_slurm() -> int:
        from shardwright.launcher.slurm import Options, submit

        options = Options(
            nodes=nodes, processes=nproc, time=time, partition=partition, account=account, settings=sbatch or (),
            grace=grace, restarts=restarts, python=python,
        )  # fmt: skip
        return submit(config, settings, options, only_print=only_print)

    def write_kubernetes() -> int:
        from shardwright.launcher.kubernetes import write_manifest
        from shardwright.launcher.manifest import build_wanted, write

        wanted = build_wanted(
            config, settings, nodes=nodes, processes=nproc or 1, environment=env or (), secrets=secret or (),
            restarts=restarts,
        )  # fmt: skip
        return write(write_manifest(wanted, image=image, claim=claim), output)

    def write_sky() -> int:
        from shardwright.launcher.manifest import build_wanted, write
        from shardwright.launcher.sky import parse_gpus, write_task

        wanted = build_wanted(
            config, settings, nodes=nodes, processes=parse_gpus(gpus), environment=env or (), secrets=secret or (),
            restarts=restarts,
        )  # fmt: skip
        return write(write_task(wanted, cloud=cloud, gpus=gpus, spot=spot, storage=storage, image=image), output)

    starts: dict[str, Callable[[], int]] = {
        HERE: start_here, SLURM: start_slurm, KUBERNETES: write_kubernetes, SKY: write_sky
    }  # fmt: skip
    raise typer.Exit(starts[way]())


def _choose(asked: dict[str, bool]) -> str:
    """The way that was asked for; ConfigError for two of them."""
    ways = [way for way, wanted in asked.items() if wanted]
    if len(ways) > 1:
        raise ConfigError(f"{ways[1]}: does not go with {ways[0]}")
    return ways[0] if ways else HERE


def _refuse_strangers(context: typer.Context, way: str) -> None:
    """ConfigError for an option of another way to launch."""
    for name in sorted({name for names in WAYS.values() for name in names} - WAYS[way]):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            fits = " and ".join(other for other, names in WAYS.items() if name in names)
            option = name.removeprefix("only_").replace("_", "-")
            raise ConfigError(f"--{option}: does not go with {way}; it is for {fits}")
