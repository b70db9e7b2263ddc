"""What `doctor` looks at without measuring: the machine and its limits, torch and its devices, optional features.

Room launcher. Each function returns checks; none changes anything, and none raises for what it finds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from shardwright.hardware import device_name, find_device, memory, versions
from shardwright.train.compiler import find_compiler

GIB = 2**30
Status = Literal["ok", "missing", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One finding: `missing` is optional and absent, `warning` works but will hurt, `failed` is broken."""

    group: str
    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Feature:
    """An optional feature, the modules it needs and the extra that brings them."""

    name: str
    modules: Sequence[str]
    extra: str


FEATURES = (
    Feature("near-duplicate removal", ("datasketch",), "data"),
    Feature("language filter", ("py3langid",), "data"),
    Feature("Parquet input", ("pyarrow",), "data"),
    Feature("zstd input", ("zstandard",), "data"),
    Feature("Common Crawl input", ("warcio", "trafilatura"), "data"),
    Feature("SentencePiece tokenizers", ("sentencepiece",), "data"),
    Feature("tiktoken tokenizers", ("tiktoken",), "data"),
    Feature("Hugging Face datasets and models", ("transformers", "datasets"), "hf"),
    Feature("exports in 8 and 4 bits", ("torchao", "transformers"), "export"),
    Feature("DeepSpeed", ("deepspeed",), "deepspeed"),
    Feature("Accelerate", ("accelerate",), "accelerate"),
    Feature("shards on S3", ("s3fs",), "s3"),
    Feature("Weights & Biases", ("wandb",), "wandb"),
    Feature("tests", ("pytest", "hypothesis", "ruff", "mypy"), "dev"),
)
PACKAGES = ("torch", "numpy", "pydantic", "webdataset", "tokenizers", "safetensors", "tensorboard", "plotly")


def check_machine() -> Iterator[Check]:
    """Processor, memory, disk, and the limits a container or a shell sets."""
    import torch

    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    name = device_name(torch.device("cpu"))
    detail = f"{name}, {cores} cores usable, {torch.backends.cpu.get_cpu_capability()}{_extras()}"
    if quota is not None and quota < cores:
        yield Check(
            "machine", "processor", "warning", f"{detail}; the container grants {quota:g} of them",
            f"train.threads={max(int(quota), 1)}, or threads wait for each other",
        )  # fmt: skip
    else:
        yield Check("machine", "processor", "ok", detail)
    total, free = memory()
    yield Check("machine", "memory", "ok", f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free")
    yield _disk(Path.cwd())
    yield from _shared_memory()
    yield _open_files()
    yield _network()


def check_torch() -> Iterator[Check]:
    """Versions, devices, and what torch.compile needs."""
    found = versions(PACKAGES)
    yield Check("torch", "versions", "ok", ", ".join(f"{k} {v}" for k, v in found.items()))
    yield from check_devices()
    yield check_compiler()


def check_devices() -> Iterator[Check]:
    """The GPUs that torch sees; where the driver sees more, why that may be."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            reported = torch.cuda.get_device_name(index)
            total = torch.cuda.get_device_properties(index).total_memory / GIB
            known = find_device(reported)
            peak = f"known as {known.name}" if known else "peak unknown, so no MFU unless log.measure_peak=true"
            yield Check("torch", f"GPU {index}", "ok", f"{reported}, {total:.1f} GiB, {peak}")
        return
    driver = driver_devices()
    if driver:
        yield Check(
            "torch", "GPU", "warning", f"the driver has {driver}, torch {torch.__version__} does not see it",
            "install a torch build for this driver's CUDA: pytorch.org/get-started",
        )  # fmt: skip
    else:
        yield Check("torch", "GPU", "missing", "none: training runs on the CPU")


def check_compiler() -> Check:
    """Builds a small library as torch.compile would: a C++ compiler, OpenMP and Python's headers."""
    compiler = find_compiler()
    advice = "apt-get install g++ python{}.{}-dev; else train.compile=false".format(*sys.version_info)
    if compiler is None:
        return Check("torch", "torch.compile", "missing", "no C++ compiler, so blocks run uncompiled", advice)
    source = '#include <Python.h>\n#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.cpp"
        file.write_text(source)
        include = f"-I{sysconfig.get_paths()['include']}"
        flags = ["-std=c++17", "-shared", "-fPIC", "-fopenmp", include, "-o", str(file.with_suffix(".so"))]
        try:
            done = subprocess.run([compiler, str(file), *flags], capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Check("torch", "torch.compile", "warning", f"{compiler} does not run: {error}", advice)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
        return Check("torch", "torch.compile", "warning", f"{compiler} fails: {lines[0]}", advice)
    return Check("torch", "torch.compile", "ok", f"{compiler} builds with OpenMP and Python's headers")


def check_features() -> Iterator[Check]:
    """Which optional features are there, and what brings the others."""
    for feature in FEATURES:
        absent = [module for module in feature.modules if importlib.util.find_spec(module) is None]
        if absent:
            remedy = f"pip install 'shardwright[{feature.extra}]'"
            yield Check("features", feature.name, "missing", f"without {', '.join(absent)}", remedy)
        else:
            yield Check("features", feature.name, "ok", ", ".join(_with_version(module) for module in feature.modules))
    yield check_apex()


def check_apex() -> Check:
    """NVIDIA's apex, which is optional, told from the package that has its name on PyPI."""
    spec = importlib.util.find_spec("apex")
    source = "build it from github.com/NVIDIA/apex; `pip install apex` brings an unrelated project of that name"
    if spec is None:
        return Check("features", "NVIDIA apex", "missing", "not needed: torch's own fused kernels are used", source)
    places = [Path(place) for place in spec.submodule_search_locations or []]
    if any((place / "optimizers" / "fused_adam.py").is_file() for place in places):
        return Check("features", "NVIDIA apex", "ok", f"{_with_version('apex')} at {places[0]}")
    remedy = f"pip uninstall apex; {source}"
    return Check("features", "NVIDIA apex", "warning", "the apex that is installed is PyPI's unrelated project", remedy)


def cpu_quota() -> float | None:
    """CPUs that the container grants; None where there is no limit."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(quota) / float(period)
    return None


def _extras() -> str:
    """Instructions for low precision, which decide whether bf16 pays on this CPU."""
    with suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        found = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_fp16") if flag in flags]
        return "".join(f" {flag}" for flag in found)
    return ""


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Check("machine", "disk", "warning", f"no permission to write in {folder}", "start in another folder")
    detail = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB:
        return Check("machine", "disk", "warning", detail, "free some: a checkpoint takes 12 bytes a parameter")
    return Check("machine", "disk", "ok", detail)


def _shared_memory() -> Iterator[Check]:
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    total = shutil.disk_usage(place).total
    small = total < GIB
    yield Check(
        "machine", "shared memory", "warning" if small else "ok", f"{total / GIB:.2f} GiB in {place}",
        "loader processes may die: docker run --shm-size=8g, or data.workers=thread" if small else "",
    )  # fmt: skip


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Check("machine", "open files", "warning", f"at most {soft}", f"ulimit -n {min(hard, 65536)}")
    return Check("machine", "open files", "ok", f"at most {soft:,}")


def _network() -> Check:
    """Interfaces that other machines can reach; gloo takes the one the host name resolves to."""
    addresses = {
        name: next((a.address for a in found if a.family == socket.AF_INET), "")
        for name, found in psutil.net_if_addrs().items()
    }
    outside = {name: address for name, address in addresses.items() if address and not address.startswith("127.")}
    detail = ", ".join(f"{name} {address}" for name, address in outside.items()) or "this machine only"
    own = ""
    with suppress(OSError):
        own = socket.gethostbyname(platform.node())
    if outside and own not in outside.values():
        detail += f"; {platform.node()} resolves to {own or 'nothing'}"
        advice = f"for several machines: export GLOO_SOCKET_IFNAME={next(iter(outside))}"
        return Check("machine", "network", "ok", detail, advice)
    return Check("machine", "network", "ok", detail)


def driver_devices() -> str:
    """Names of the GPUs that NVIDIA's driver has; empty without one."""
    with suppress(Exception):  # no library, no driver: nothing to report
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return ", ".join(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
    return ""


def _with_version(module: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return f"{module} {importlib.metadata.version(module)}"
    return module
