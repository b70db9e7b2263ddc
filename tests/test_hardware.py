"""Hardware files against each other and against physics; peaks, measurements and energy on the device at hand."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from shardwright import hardware
from shardwright.config import ConfigError
from shardwright.hardware import EnergyMeter, find_device, list_hardware, load_hardware

CPU = torch.device("cpu")
WANTED = {
    "v100-16gb-8", "v100-32gb-8", "a100-40gb-sxm-8", "a100-80gb-sxm-8", "h100-sxm-8", "h100-pcie-8", "h200-sxm-8",
    "b200-sxm-8", "mi300x-8", "l4-8", "l40s-8", "a10g-8", "t4-4", "rtx-3090-1", "rtx-4090-1", "rtx-5090-1", "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(list_hardware()))
def test_every_shipped_file_is_whole_and_consistent(name: str) -> None:
    spec = load_hardware(name)
    peaks, device = spec.device.peak_tflops, spec.device
    assert spec.name == name
    for low, high in (("fp32", "tf32"), ("tf32", "bf16"), ("tf32", "fp16"), ("bf16", "fp8"), ("fp16", "fp8")):
        if low in peaks and high in peaks:
            assert peaks[low] <= 1.01 * peaks[high], "data sheets round"
    for number_format, measured in device.gemm_tflops.items():
        assert 0.5 < measured / peaks[number_format] < 1.15, "consumer cards boost over their sheet, nothing more"
    assert {"device", "memory", "link", "fabric", "watts"} <= set(spec.sources)
    assert (spec.price is None) or ("price" in spec.sources and spec.price.low <= spec.price.usd_per_device_hour)
    assert (spec.price is None) or spec.price.usd_per_device_hour <= spec.price.high
    assert spec.fabric is not None
    assert spec.fabric.gb_s <= spec.node.link.gb_s


def test_the_devices_people_rent_are_there() -> None:
    assert set(list_hardware()) >= WANTED


def test_a_file_is_found_by_name_by_path_and_by_shipped_path() -> None:
    path = list_hardware()["h100-sxm-8"]
    by_name = load_hardware("h100-sxm-8")
    assert by_name == load_hardware(path) == load_hardware("configs/hardware/h100-sxm-8.yaml")
    assert by_name.device.peak_tflops["bf16"] == 989
    assert by_name.node.devices == 8


def test_wrong_names_and_wrong_files_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"h100-sxm: no such hardware file; did you mean h100-sxm-8"):
        load_hardware("h100-sxm")
    with pytest.raises(ConfigError, match=r"no such hardware file"):
        load_hardware(tmp_path / "h100-sxm-8.yaml")
    raw = yaml.safe_load(list_hardware()["h100-sxm-8"].read_text())
    raw["device"]["bandwidth_gbs"] = raw["device"].pop("bandwidth_gb_s")
    wrong = tmp_path / "mine.yaml"
    wrong.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"mine.yaml: device.bandwidth") as caught:
        load_hardware(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "reported",
    ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "H100"],
)
def test_a_near_miss_is_an_unknown_device(reported: str) -> None:
    assert find_device(reported) is None


def test_devices_are_recognised_by_the_drivers_name() -> None:
    names = {"NVIDIA A100-SXM4-80GB": "A100-80GB-SXM", "Tesla T4": "T4", "NVIDIA GeForce RTX 4090": "RTX-4090"}
    assert {reported: find_device(reported).name for reported in names} == names  # type: ignore[union-attr]


def test_no_two_files_claim_one_driver_name() -> None:
    names = [n for file in list_hardware() for n in load_hardware(file).device.reported_as]
    assert len(names) == len(set(names))


def test_an_unknown_device_has_no_peak() -> None:
    assert hardware.known_peak(CPU, torch.bfloat16) is None
    assert hardware.peak_flops(CPU, torch.float32) is None


def test_a_known_device_has_the_peak_of_its_format() -> None:
    peak = hardware.documented_peak("NVIDIA H100 80GB HBM3", "bf16")
    assert peak == hardware.Peak(989e12, "H100-80GB-SXM dense bf16 peak, 989 TFLOP/s")
    assert hardware.documented_peak("Tesla T4", "bf16") is None, "no bf16 units, no bf16 peak"


def test_float32_counts_as_tf32_where_torch_was_told_so() -> None:
    gpu, before = torch.device("cuda", 0), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert hardware.number_format(gpu, torch.float32) == "fp32"
        torch.set_float32_matmul_precision("high")
        assert hardware.number_format(gpu, torch.float32) == "tf32"
        assert hardware.number_format(CPU, torch.float32) == "fp32"
        assert hardware.number_format(gpu, torch.bfloat16) == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_peak_is_a_ceiling_in_its_own_words(dtype: torch.dtype) -> None:
    peak = hardware.measured_peak(CPU, dtype, seconds=0.2)
    assert 1e8 < peak.flops < 1e15
    assert re.fullmatch(r"measured (fp32|bf16) GEMM peak, [\d.]+ [MGT]FLOP/s", peak.basis)


def test_bandwidth_is_within_what_memory_can_do() -> None:
    assert 1e8 < hardware.measure_bandwidth(CPU, seconds=0.1, mib=32) < 1e13


def test_energy_is_unknown_where_nothing_reports_it() -> None:
    meter = EnergyMeter(CPU)
    assert (meter.kwh(), meter.joules(), meter.watts()) == (None, None, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with NVML")
def test_energy_of_a_gpu_grows_with_work() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    meter = EnergyMeter(device)
    if meter.watts() is None:
        pytest.skip("NVML does not report this device's power")
    hardware.measure_gemm(device, torch.float16, seconds=1.0)
    assert (meter.joules() or 0) > 1.0


def test_versions_name_what_is_installed() -> None:
    found = hardware.versions(("torch", "no-such-package"))
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert "no-such-package" not in found
    assert {"python", "shardwright"} <= set(found)
