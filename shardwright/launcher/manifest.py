"""What kubernetes.py and sky.py write their manifests from: a config that was checked, and nothing secret.

Under launch.py. A manifest lies in files and version control, and everybody who may list jobs reads it: whatever looks
like a secret is refused, with the way by which it is given instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shardwright.config import Config, ConfigError, find_secret, is_secret_name
from shardwright.launcher.launch import why_not
from shardwright.train.settings import read_config

MODULE = "shardwright"
FILE = re.compile(r"[A-Za-z0-9][-._A-Za-z0-9]*\.ya?ml")


@dataclass(frozen=True)
class Wanted:
    """A run that is to be started elsewhere."""

    name: str  # of letters, digits and hyphens
    config: str  # as the run is told it
    overrides: Sequence[str]
    nodes: int
    processes: int  # of each node
    gpus: int  # of each node; 0 where the config asks for the CPU
    file: Path | None = None  # that has to come along; None for a shipped config
    environment: Mapping[str, str] | None = None
    secrets: Sequence[str] = ()
    restarts: int = 3

    def command(self, config: str) -> list[str]:
        """What torchrun runs, `config` being where the config lies there."""
        return ["-m", MODULE, "train", config, *self.overrides]


def build_wanted(
    config: str,
    overrides: Sequence[str],
    *,
    nodes: int,
    processes: int,
    environment: Sequence[str] = (),
    secrets: Sequence[str] = (),
    restarts: int = 3,
) -> Wanted:
    """Check all that can be checked here; ConfigError where it cannot run there or would give a secret away."""
    resolved = read_config(config, overrides)
    reason = why_not(resolved, nodes * processes)
    if reason is not None:
        raise ConfigError(reason)
    _refuse_absolute(resolved)
    refuse_secrets([config, *overrides])
    file = Path(config) if Path(config).is_file() else None
    if file is not None:
        refuse_secrets([file.read_text(encoding="utf-8")])
        if not FILE.fullmatch(file.name):
            raise ConfigError(f"{file}: the name of a config that is sent along may have letters, digits and -._ only")
    name = re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")[:40].strip("-") or "run"
    return Wanted(
        name=name if name[0].isalpha() else f"run-{name}",  # names of services begin with a letter
        config=config,
        overrides=tuple(overrides),
        nodes=nodes,
        processes=processes,
        gpus=0 if resolved.train.device == "cpu" else processes,
        file=file,
        environment=read_variables(environment),
        secrets=tuple(secrets),
        restarts=restarts,
    )


def read_variables(names: Sequence[str]) -> dict[str, str]:
    """Variables by NAME (as it is here) or NAME=VALUE; ConfigError for one that looks like a secret."""
    found = {}
    for given in names:
        name, equals, value = given.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {given}: expected NAME or NAME=VALUE")
        if is_secret_name(name):
            raise ConfigError(f"--env {name}: looks like a secret, and a manifest is read by many; give it by --secret")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: is not set here")
        found[name] = value if equals else os.environ[name]
    refuse_secrets(list(found.values()))
    return found


def refuse_secrets(texts: Sequence[str]) -> None:
    """ConfigError where a URL in one of them gives something away; it is not repeated."""
    for text in texts:
        if find_secret(text):
            raise ConfigError(
                "a URL here holds a password or a signature, which the manifest would give away; take it out, and "
                "give it by --secret as fsspec reads it (docs/trust.md)"
            )


def _refuse_absolute(config: Config) -> None:
    """A run folder of this machine is none over there: it is to lie below the shared folder."""
    if config.run is not None and Path(config.run).is_absolute():
        raise ConfigError(f"run={config.run}: give a path relative to the shared folder, such as run=runs/english")


class _Plain(yaml.SafeDumper):
    """Texts of several lines as blocks, equal parts written out."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)


def to_yaml(documents: Sequence[Mapping[str, Any]], head: str) -> str:
    """Documents under comment lines."""
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    return comment + yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)


def write(text: str, output: Path | None) -> int:
    """To a file, or to standard output; the exit code."""
    if output is None:
        print(text, end="")
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return 0
