"""What devices and links can do: the files of configs/hardware, the device at hand, and its measured ceilings.

Lowest room, beside config. A hardware file states a device (memory, bandwidth, dense peak by number format), the node
and fabric around it, price and watts, each with its source; MFU and the planner read the same file. A device is
recognised by the exact name its driver reports: a near miss (a laptop chip, a MIG slice) would give a wrong peak, so
it counts as unknown, and an unknown device has no MFU unless its GEMM peak is measured.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from pydantic import Field

from shardwright import __version__
from shardwright.config import ConfigError, Strict, config_folders, parse, read_yaml
from shardwright.log import quantity

if TYPE_CHECKING:
    import torch

Format = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]


class Device(Strict):
    """One accelerator as its system sees it."""

    name: str
    reported_as: list[str] = Field(description="Exact names the driver reports; empty is never recognised")
    memory_gib: float = Field(gt=0)
    bandwidth_gb_s: float = Field(gt=0, description="Memory bandwidth, 1e9 bytes a second")
    peak_tflops: dict[Format, float] = Field(description="Dense peak, 1e12 floating-point operations a second")
    gemm_tflops: dict[Format, float] = Field({}, description="Best rate that a large matmul was measured to reach")
    watts: float = Field(gt=0)


class Link(Strict):
    """What joins the devices of a node, or a node to the others. Bandwidth of one device in one direction."""

    name: str
    gb_s: float = Field(gt=0)
    latency_us: float = Field(ge=0, description="Time of one ring step without its bytes")


class Fabric(Link):
    """The network between nodes."""

    oversubscription: float = Field(1.0, ge=1, description="Bandwidth of the ports over that of the core")


class Node(Strict):
    """Devices that share the fast link."""

    devices: int = Field(ge=1)
    link: Link


class Price(Strict):
    """List prices in US dollars for an hour of one device: the named offer, and the lowest and highest seen."""

    usd_per_device_hour: float = Field(gt=0)
    offer: str
    low: float = Field(gt=0)
    high: float = Field(gt=0)


class Hardware(Strict):
    """One file of configs/hardware."""

    name: str
    device: Device
    node: Node
    fabric: Fabric | None = None
    price: Price | None = None
    sources: dict[str, str]


def list_hardware() -> dict[str, Path]:
    """Shipped hardware files by name."""
    return {path.stem: path for folder in config_folders() for path in sorted((folder / "hardware").glob("*.yaml"))}


def load_hardware(name: str | Path) -> Hardware:
    """A hardware file by path or shipped name; ConfigError in one line otherwise."""
    given, shipped = Path(name), list_hardware()
    if given.is_file():
        return parse(Hardware, read_yaml(given), str(given))
    stem = given.name.removesuffix(".yaml")
    if stem in shipped and str(given.parent) in (".", "hardware", "configs/hardware"):
        return parse(Hardware, read_yaml(shipped[stem]), str(shipped[stem]))
    close = difflib.get_close_matches(stem, shipped, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"shipped: {', '.join(shipped)}"
    raise ConfigError(f"{name}: no such hardware file; {hint}")


@cache
def _devices() -> dict[str, Device]:
    files = [parse(Hardware, read_yaml(path), str(path)).device for path in list_hardware().values()]
    return {reported: device for device in files for reported in device.reported_as}


def find_device(reported: str) -> Device | None:
    """The device whose driver reports exactly this name; None where no hardware file knows it."""
    return _devices().get(reported.strip())


@dataclass(frozen=True)
class Peak:
    """A ceiling of one device in FLOP/s, and in words what it is: the denominator of an MFU."""

    flops: float
    basis: str


def device_name(device: torch.device) -> str:
    """What the driver, or the operating system for a CPU, calls the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def number_format(device: torch.device, dtype: torch.dtype) -> Format:
    """The format in which matmuls of this dtype run: float32 is TF32 on a GPU where torch was told so."""
    import torch

    names: dict[torch.dtype, Format] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype is torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return names.get(dtype, "fp32")


def documented_peak(reported: str, number_format: Format) -> Peak | None:
    """The dense peak of the device with this driver name; None where no file knows the device or the format."""
    spec = find_device(reported)
    if spec is None or number_format not in spec.peak_tflops:
        return None
    flops = spec.peak_tflops[number_format] * 1e12
    return Peak(flops, f"{spec.name} dense {number_format} peak, {quantity(flops, ' ')}FLOP/s")


def known_peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The documented dense peak of this device and dtype; None where it is not known."""
    if device.type != "cuda":  # no CPU is recognised: cores, clock and instructions vary under one name
        return None
    return documented_peak(device_name(device), number_format(device, dtype))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """`known_peak` as a number of FLOP/s."""
    peak = known_peak(device, dtype)
    return peak.flops if peak else None


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> Peak:
    """The best GEMM rate that this device reaches now, with this process's threads."""
    flops = measure_gemm(device, dtype, seconds)
    return Peak(flops, f"measured {number_format(device, dtype)} GEMM peak, {quantity(flops, ' ')}FLOP/s")


def measure_gemm(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Best FLOP/s over square products of growing size (2 n^3 operations each), in about `seconds`.

    The best and not the mean: it is the ceiling that a step is compared with. The clock decides the largest size, so a
    format without fast instructions ends in time as well.
    """
    import torch

    best, deadline = 0.0, time.perf_counter() + seconds
    for n in (512, 1024, 2048, 4096, 8192):
        if best and 3 * 2 * n**3 / best > deadline - time.perf_counter():
            break
        a = torch.randn(n, n, device=device, dtype=torch.float32).to(dtype)
        b = torch.randn(n, n, device=device, dtype=torch.float32).to(dtype)
        out = torch.empty(n, n, device=device, dtype=dtype)
        share = (deadline - time.perf_counter()) / 4
        best = max(best, 2 * n**3 / _best_time(partial(torch.mm, a, b.t(), out=out), device, share))
    return best


def measure_bandwidth(device: torch.device, seconds: float = 1.0, mib: int = 256) -> float:
    """Best bytes a second of a large copy, reads and writes counted (STREAM's copy)."""
    import torch

    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_time(partial(target.copy_, source), device, seconds)


def _best_time(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Shortest time of one call, after a warm-up call, over about `seconds` and at least 3 calls."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    wait()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 10_000):
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


class EnergyMeter:
    """Energy that one GPU drew since the meter was made, read through NVML; knows nothing on other devices.

    Volta and later count millijoules; older cards report power alone, which is integrated between calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = _nvml_handle(device)
        self._start = self._counter()
        self._integral, self._last = 0.0, time.monotonic()

    def watts(self) -> float | None:
        """Power drawn now, in watts."""
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def joules(self) -> float | None:
        """Energy drawn since the meter was made; None where NVML does not say."""
        counter = self._counter()
        if counter is not None and self._start is not None:
            return (counter - self._start) / 1e3
        watts, now = self.watts(), time.monotonic()
        if watts is None:
            return None
        self._integral, self._last = self._integral + watts * (now - self._last), now
        return self._integral

    def kwh(self) -> float | None:
        """`joules` in kilowatt hours."""
        joules = self.joules()
        return None if joules is None else joules / 3.6e6

    def _counter(self) -> int | None:
        return self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def _ask(self, function: str) -> int | None:
        if self._handle is None:
            return None
        import pynvml

        with suppress(pynvml.NVMLError):
            return int(getattr(pynvml, function)(self._handle))
        return None


def _nvml_handle(device: torch.device) -> Any | None:
    """NVML's handle of a torch device, found by UUID: CUDA_VISIBLE_DEVICES renumbers devices, NVML does not know."""
    if device.type != "cuda":
        return None
    import torch

    with suppress(Exception):  # no NVML, no driver, a ROCm build, a MIG slice: there is then no energy to report
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return None


def memory() -> tuple[int, int]:
    """(total, free) bytes that this process may use: the machine's, or its container's where that is less."""
    machine = psutil.virtual_memory()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is None or limit >= machine.total:
        return machine.total, machine.available
    return int(limit), int(min(machine.available, limit - (used or 0)))


def _cgroup(name: str) -> float | None:
    with suppress(OSError, ValueError):
        return float((Path("/sys/fs/cgroup") / name).read_text())
    return None


def versions(packages: Iterable[str] = ("torch", "numpy")) -> dict[str, str]:
    """Versions of this project, of Python and of installed packages; what is not installed is left out."""
    found = {"shardwright": __version__, "python": platform.python_version()}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
