"""What the ranks of test_cluster.py run: the real examination, with one rank's world made wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from shardwright.config import RunError
from shardwright.launcher import cluster, survey


def examine(
    fault: str, source: str | None, overrides: list[str], patience_s: float | None = None
) -> tuple[int, Any, str]:
    """(exit code, what it printed as JSON or None, the line it raised) of one rank; the last one has the fault.

    `patience_s` is how long ranks wait for each other after they have met, which takes long where all import torch.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    before = dict(os.environ)
    output, folder = io.StringIO(), os.getcwd()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(mock.patch.object(survey.Site, "leads_host", True))  # as if each were on a host
            if patience_s is not None:
                stack.enter_context(mock.patch.object(cluster, "look", partial(_look, cluster.look, patience_s)))
            if rank == size - 1 and fault:
                FAULTS[fault](stack)
            code = cluster.doctor_cluster(source, overrides, as_json=True)
    except RunError as error:
        return 1, None, str(error)
    except SystemExit as error:
        return int(error.code or 0), None, ""
    finally:
        os.chdir(folder)
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
    return code, json.loads(output.getvalue()) if output.getvalue() else None, ""


def _look(real: Callable[..., Any], patience_s: float, site: survey.Site, step: cluster.Step) -> Any:
    site.book.limit_s = patience_s
    return real(site, step)


def _other_versions(stack: contextlib.ExitStack) -> None:
    stack.enter_context(mock.patch.object(survey.torch, "__version__", "2.12.9"))


def _clock(stack: contextlib.ExitStack) -> None:
    stack.enter_context(mock.patch.object(survey, "read_clock", lambda: time.time() + 77.5))


def _interface(stack: contextlib.ExitStack) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"


def _inside(stack: contextlib.ExitStack) -> None:
    """Ranks of two hosts over loopback: the other host has the name of another machine."""
    stack.enter_context(mock.patch.object(socket, "gethostname", lambda: "elsewhere"))


def _elsewhere(stack: contextlib.ExitStack) -> None:
    """The host has a folder of its own where the others share one."""
    stack.enter_context(mock.patch.object(survey, "SEE_S", 0.5))
    os.chdir("/")


def _read_only(stack: contextlib.ExitStack) -> None:
    """Root may write anywhere, so it is the write itself that fails, as on a read-only mount."""
    real = survey.Path.write_text

    def refuse(self: survey.Path, *args: Any, **options: Any) -> int:
        if ".doctor-" in str(self):
            raise OSError(30, "Read-only file system", str(self))
        return real(self, *args, **options)

    stack.enter_context(mock.patch.object(survey.Path, "write_text", refuse))


def _wrong_sum(stack: contextlib.ExitStack) -> None:
    """A network card that changes what it carries: this rank puts in another number than it should."""
    real = survey.torch.full

    def full(size: Any, value: float, **options: Any) -> Any:
        return real(size, value + (size == (survey.REDUCED_BYTES // 4,)), **options)

    stack.enter_context(mock.patch.object(survey.torch, "full", full))


def _stuck(stack: contextlib.ExitStack) -> None:
    """It hangs in a step, as on a dead file system; longer than the others wait."""
    stack.enter_context(mock.patch.object(survey, "read_versions", lambda: time.sleep(4.5) or {}))


FAULTS = {
    "versions": _other_versions,
    "clock": _clock,
    "interface": _interface,
    "inside": _inside,
    "elsewhere": _elsewhere,
    "read-only": _read_only,
    "sum": _wrong_sum,
    "stuck": _stuck,
}
