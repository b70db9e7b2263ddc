"""The command line: a thin face over the Python functions.

Exit codes: 0 success, 1 a failure, 2 bad usage or config, 75 stopped by a signal with all saved
(start the same command again to go on), 130 left at once by Ctrl-C. Mistakes get one line; ``--traceback``,
wherever it stands, shows the rest.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwright import __version__
from shardwright.config import ConfigError, RunError, apply_override
from shardwright.launcher.arguments import ConfigName, Json, Overrides
from shardwright.launcher.early import leaving_at_once, settle
from shardwright.launcher.exchange import export, import_, prune
from shardwright.launcher.leash import on_leash
from shardwright.launcher.network import choose_interface
from shardwright.launcher.ways import launch
from shardwright.launcher.world import enter_world
from shardwright.log import get_logger

STOPPED = 75
DEFERENCE_S = 15.0  # ending a process that has torch loaded takes seconds on a busy host
INTERRUPTED = 130  # what typer makes of Ctrl-C
TRACEBACK = "--traceback"
# Bad usage. Older typers take click's class, newer ones bring their own.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="shardwright",
    help="Train every kind of dense Transformer language model, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it")] = False,
    show_traceback: Annotated[bool, typer.Option(TRACEBACK, help="Show an error's traceback; goes anywhere")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # deepspeed's launcher adds it
) -> None:
    """Options of every command."""


@app.command(epilog="Example: shardwright prepare bundled:english --output data/english tokenizer.vocab_size=8192")
def prepare(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, URLs, hf:NAME, bundled:english; key=value")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the prepared shards")],
    engine: Annotated[str | None, typer.Option(help="Who runs the work: processes (of this machine) or ray")] = None,
    ray_address: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster, or auto; else Ray here")] = None,
    as_json: Json = False,
) -> None:
    """Clean, split, tokenise and shard a corpus."""
    from shardwright.config import parse
    from shardwright.data.prepare import PrepareConfig
    from shardwright.data.prepare import prepare as run

    raw: dict[str, Any] = {"input": [i for i in inputs if not _is_setting(i)], "output": str(output)}
    raw |= {key: value for key, value in (("engine", engine), ("ray_address", ray_address)) if value is not None}
    for setting in filter(_is_setting, inputs):
        apply_override(raw, setting)
    with redirect_stdout(sys.stderr):  # where Ray, too, may say what befalls its workers
        manifest = run(parse(PrepareConfig, raw, "prepare"), progress=not as_json)
    if as_json:
        splits = {n: {"tokens": s.tokens, "documents": s.documents} for n, s in manifest.splits.items()}
        print(json.dumps({"output": str(output), "splits": splits, "counts": manifest.counts}))


def _is_setting(argument: str) -> bool:
    """Whether an argument is key=value, and not a file of such a name."""
    key, equals, _ = argument.partition("=")
    if not equals or not key.replace(".", "").replace("_", "").isalnum():
        return False
    return not os.path.exists(argument)


@app.command(epilog="Example: shardwright train configs/english.yaml train.budget=2m run=runs/trial")
def train(
    config: ConfigName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print config, batch, size and memory, and stop")] = False,
    debugging: Annotated[bool, typer.Option("--debug", help="20 steps in one process, pdb where it fails")] = False,
    small: Annotated[bool, typer.Option("--small", help="With --debug: fewer layers, a small batch")] = False,
    as_json: Json = False,
) -> None:
    """Train a model; run it again to continue where it stopped."""
    from shardwright.train.settings import read_config

    resolved = read_config(config, overrides or ())
    if dry_run:
        from shardwright.train.preview import preview

        print(preview(resolved, as_json=as_json))
        return
    if small and not debugging:
        raise ConfigError("--small: goes with --debug")
    choose_interface(enter_world())
    if as_json:
        get_logger().setLevel(logging.WARNING)
    if debugging:
        from shardwright.train.debug import debug

        result = debug(resolved, small=small)
    else:
        from shardwright.planner.stall_page import write_page
        from shardwright.train.run import train as run

        result = run(resolved, write_page, settle)
    if as_json:
        print(json.dumps(result.as_dict()))
    if result.stopped:
        raise typer.Exit(STOPPED)


app.command(epilog="Example: shardwright launch --nproc 4 configs/english.yaml parallel.tensor=2")(launch)


app.command(name="import", epilog="Example: shardwright import openai-community/gpt2 --output models/gpt2")(import_)
app.command(epilog="Example: shardwright export runs/english --output english-hf --dtype bf16")(export)
app.command(epilog="Example: shardwright prune runs/english --output models/sparse --pattern 2:4")(prune)


@app.command(name="eval", epilog="Example: shardwright eval runs/english")
def evaluate(
    run_folder: Annotated[Path, typer.Argument(help="Run folder, checkpoint or Hugging Face folder")],
    data: Annotated[str | None, typer.Option(help="Prepared folder; default the run's own")] = None,
    as_json: Json = False,
) -> None:
    """Validation loss, perplexity and bits per byte, beside what xz needs for the same text."""
    from shardwright.train.score import evaluate_run

    if as_json:
        get_logger().setLevel(logging.WARNING)
    answer = evaluate_run(run_folder, data)
    print(json.dumps(answer) if as_json else "\n".join(f"{k}: {v:.4f}" for k, v in answer.items()))


@app.command(epilog='Example: shardwright generate runs/english --prompt "Fellow citizens" --tokens 100')
def generate(
    run_folder: Annotated[Path, typer.Argument(help="Run folder, checkpoint or Hugging Face folder")],
    prompt: Annotated[str, typer.Option(help="Text to go on from")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0 among all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample within this share of probability")] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same text")] = 0,
) -> None:
    """Sample text from a trained model, as it comes."""
    from shardwright.serve.generate import Sampling, check_prompt, stream_text
    from shardwright.train.load import load

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    check_prompt(prompt)
    loaded = load(run_folder)
    if loaded.model.config.kind == "decoder":  # else the prompt is what is read, and the text another
        sys.stdout.write(prompt)
    told: dict[str, Any] = {"max_new_tokens": tokens, "frame": loaded.frame}
    for piece in stream_text(loaded.model, loaded.tokenizer, prompt, sampling, **told):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command(epilog="Example: shardwright verify configs/english.yaml, or torchrun -m shardwright verify ... for ranks")
def verify(
    config: ConfigName,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to compare")] = 3,
    number_format: Annotated[
        str, typer.Option("--format", metavar="fp32|fp64|config", help="fp64 has the tightest bound; config: its own")
    ] = "fp32",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write an HTML page here")] = None,
    as_json: Json = False,
) -> None:
    """Compare steps under this layout with the same in one process; name the first tensor that differs."""
    from shardwright.planner.verify_page import as_text, check_place, write_page
    from shardwright.train.settings import read_config
    from shardwright.train.verify import Report
    from shardwright.train.verify import verify as run

    def tell(report: Report) -> None:
        print(json.dumps(report.as_dict()) if as_json else as_text(report), flush=True)
        if output is not None:
            place = write_page(report, output)
            print(place, file=sys.stderr if as_json else sys.stdout, flush=True)

    if as_json:
        get_logger().setLevel(logging.WARNING)
    choose_interface(enter_world())
    if output is not None:
        check_place(output)
    report = run(read_config(config, overrides or ()), steps=steps, number_format=number_format, tell=tell)
    raise typer.Exit(0 if report.passed else 1)


@app.command(epilog="Example: shardwright replay runs/english/capsules/step_00000123")
def replay(
    capsule: Annotated[Path, typer.Argument(help="Folder of a failing step, below capsules/ of a run")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run a saved failing step again, in one process; name the module that failed, or raise what was raised."""
    from shardwright.train.replay import replay as run

    if as_json:
        get_logger().setLevel(logging.WARNING)
    answer = run(capsule, overrides or ())
    if answer.error is not None and TRACEBACK in sys.argv:
        traceback.print_exception(answer.error)
    print(json.dumps(answer.as_dict()) if as_json else answer.text)
    raise typer.Exit(0 if answer.reproduced else 1)


@app.command(epilog="Example: shardwright layouts configs/english.yaml --world 8")
def layouts(
    config: Annotated[str | None, typer.Argument(help="Config file, or the name of a shipped config")] = None,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(min=1, help="Processes; default those of the config's degrees")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most layouts to list")] = 20,
    as_json: Json = False,
) -> None:
    """What a layout must fulfil, and which layouts of so many processes a config fits."""
    from shardwright.launcher.layouts import layouts as show
    from shardwright.train.settings import read_config

    show(None if config is None else read_config(config, overrides or ()), world, limit, json=as_json)


@app.command(epilog="Example: shardwright report runs/english --output english.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or several run folders")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: in the run folder")] = None,
) -> None:
    """Write one self-contained HTML page with the curves of a run."""
    from shardwright.planner.report import report as write

    print(write(runs if len(runs) > 1 else runs[0], output))


@app.command(epilog="Example: shardwright doctor --json, or torchrun -m shardwright doctor --cluster CONFIG on many")
def doctor(
    config: Annotated[str | None, typer.Argument(help="With --cluster: what is to run")] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="All ranks of a launcher, and what is between them")
    ] = False,
    limit: Annotated[str, typer.Option(help="With --cluster: how long ranks wait for each other")] = "60s",
    as_json: Json = False,
) -> None:
    """What this machine has, what is missing for which feature, and a quick check; or what a cluster lacks."""
    if not cluster and config is not None:
        raise ConfigError(f"{config}: a config goes with --cluster")
    if cluster:
        from shardwright.launcher.cluster import doctor_cluster

        raise typer.Exit(doctor_cluster(config, overrides or (), as_json=as_json, limit=limit))
    from shardwright.launcher.doctor import doctor as examine

    raise typer.Exit(examine(json=as_json))


@app.command(epilog="Example: shardwright schema > configs/schema.json")
def schema() -> None:
    """The JSON Schema of a config, for editors that complete YAML."""
    from shardwright.train.settings import SCHEMA

    print(json.dumps(SCHEMA.model_json_schema(), indent=1, sort_keys=True))


def main() -> None:
    """Entry point: run a command and turn a user's mistake into one line."""
    os.umask(os.umask(0o022) | 0o002)  # the user's own decides, but nothing is for everybody to write
    sys.exit(on_leash(lambda: run(sys.argv[1:], last=True)))


def run(arguments: Sequence[str], *, last: bool = False) -> int:
    """Run the command that these arguments name; its exit code. `last`: nothing but the end of the process follows."""
    given = [argument for argument in arguments if argument != TRACEBACK]
    if not given:
        app(["--help"], standalone_mode=False)
        return 2
    with leaving_at_once(last=last) if given[0] in ("train", "verify", "doctor", "launch") else nullcontext():
        return guarded(lambda: app(given, standalone_mode=False), show_traceback=len(given) < len(arguments))


def guarded(command: Callable[[], Any], *, show_traceback: bool = False) -> int:
    """Exit code of `command`, with mistakes as one line on standard error."""
    try:
        code = command()
        if code == INTERRUPTED:
            return _say("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except typer.Abort:
        return 1
    except UsageError as error:
        return _say(_usage(error), 2)
    except (ConfigError, RunError, ValueError, OSError) as error:
        if isinstance(error, ValueError):
            _let_the_first_rank_speak()
        if show_traceback:
            traceback.print_exc()
        return _say(str(error), 2 if isinstance(error, ValueError) else 1)


def _let_the_first_rank_speak() -> None:
    """A mistake in a config is found by every rank: the first of a host says it, and its launcher ends the others.

    They wait for that. Whom nobody ends has found a mistake of its own, and says it.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(DEFERENCE_S)


def _say(text: str, code: int) -> int:
    print(f"shardwright: {' '.join(text.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    """What is wrong, and where help is."""
    path = error.ctx.command_path.removeprefix(error.ctx.find_root().info_name or "").strip() if error.ctx else ""
    words = error.format_message().rstrip(".")
    return f"{words}{'' if words.endswith('?') else ';'} see shardwright {f'{path} ' if path else ''}--help"
