"""Arguments that several commands have. Beside cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigName = Annotated[str, typer.Argument(help="Config file, or the name of a shipped config")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, for example train.steps=100")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object")]
