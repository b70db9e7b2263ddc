"""What torch.compile builds its kernels with, and its failures as one line. Below layout.py, run.py and `doctor`."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from shardwright.config import RunError
from shardwright.log import get_logger

_REMEDY = "train.compile=false trains without it, and `shardwright doctor` says what it lacks"


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile calls: it knows CXX and one name, and tries no other."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


@cache  # so that it is said once
def can_compile() -> bool:
    """Whether a compiler is here and the headers that its kernels include; says what is not."""
    if find_compiler() is None:
        lacking, package = "no C++ compiler", "g++"
    elif not Path(sysconfig.get_path("include"), "Python.h").is_file():
        lacking, package = "no Python.h", "python{}.{}-dev".format(*sys.version_info)
    else:
        return True
    get_logger().info("%s found: blocks run uncompiled (Debian: apt-get install %s)", lacking, package)
    return False


@contextmanager
def compiling(is_asked_to_stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Within, what torch.compile cannot build is a RunError; KeyboardInterrupt where Ctrl-C ended the compiler too."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        if is_asked_to_stop():
            raise KeyboardInterrupt from None
        lines = str(error).splitlines()[1:]  # the first says that inductor raised
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else "")
        raise RunError(f"train.compile: torch cannot build a kernel: {reason.strip()[:300]}; {_REMEDY}") from error
