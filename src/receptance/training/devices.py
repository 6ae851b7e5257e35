"""Which device to use, and what it can do by its maker's data sheet or a short measurement."""

from __future__ import annotations

import difflib
import functools
import os
import re
import time
from dataclasses import dataclass
from typing import Protocol

import torch

THIS_MACHINE = "this-machine"
_MEASURING_SECONDS = 0.3


class Costs(Protocol):
    """What says how much work a model is: a ModelConfig, or a model."""

    @property
    def training_flops_per_token(self) -> int:
        """The operations of both passes, per token."""
        ...


@dataclass(frozen=True)
class Device:
    """An accelerator, or the processors of a machine together."""

    name: str
    flops: float
    """Peak operations per second in dense matrix products of bfloat16, summed in float32."""
    memory: float
    """Its memory in bytes."""


# Each line has the peak in TFLOP/s, the memory in GB, and a pattern of the name that torch gives.
# The figures are from the data sheets of NVIDIA and AMD; where a sheet only prints the rate with
# sparsity, half of it stands here. Variants (laptop, NVL, MIG, ...) match no pattern and are
# measured. V100 and T4 have no bfloat16, so their figure is that of float16.
_DATA_SHEETS = {
    "b200": (2250, 180, r"NVIDIA B200"),
    "h200": (989, 141, r"NVIDIA H200"),
    "h100": (989, 80, r"NVIDIA H100 80GB HBM3"),
    "h100-pcie": (756, 80, r"NVIDIA H100 PCIe"),
    "a100-80g": (312, 80, r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)"),
    "a100-40g": (312, 40, r"(NVIDIA )?A100-(SXM4|PCIE)-40GB"),
    "l40s": (362, 48, r"NVIDIA L40S"),
    "l4": (121, 24, r"NVIDIA L4"),
    "a10g": (70, 24, r"NVIDIA A10G"),
    "rtx-5090": (209.5, 32, r"NVIDIA GeForce RTX 5090"),
    "rtx-4090": (165.2, 24, r"NVIDIA GeForce RTX 4090"),
    "rtx-3090": (71, 24, r"(NVIDIA )?GeForce RTX 3090"),
    "v100": (125, 32, r"Tesla V100-SXM[23]-32GB"),
    "v100-16g": (125, 16, r"Tesla V100-SXM2-16GB"),
    "t4": (65, 16, r"Tesla T4"),
    "mi300x": (1307, 192, r"AMD Instinct MI300X"),
}
DEVICES = {
    name: Device(name, tera * 1e12, giga * 1e9) for name, (tera, giga, _) in _DATA_SHEETS.items()
}


def find_device(name: str) -> Device:
    """The data of the device of that name, or of this machine as measured.

    ValueError names the nearest name that is known.
    """
    if name == THIS_MACHINE:
        return this_machine()
    if name in DEVICES:
        return DEVICES[name]
    nearest = difflib.get_close_matches(name, [*DEVICES, THIS_MACHINE], 1, cutoff=0)[0]
    known = ", ".join([THIS_MACHINE, *DEVICES])
    raise ValueError(f"unknown device {name!r}; did you mean {nearest}? There are {known}")


def this_machine() -> Device:
    """The first GPU here or, without one, the CPU."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return Device(torch.cuda.get_device_name(0), peak_flops("cuda:0"), memory)
    return Device("this CPU", peak_flops("cpu"), _main_memory())


def peak_flops(device: torch.device | str) -> float:
    """FLOP/s that `device` reaches at best: by the data sheet, or measured once, in 0.3 s.

    What is measured is a product of float32 matrices on a CPU, with the threads torch has now,
    and of bfloat16 ones elsewhere.
    """
    device = torch.device(device)
    if device.type == "cuda" and (known := by_torch_name(torch.cuda.get_device_name(device))):
        return known.flops
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _measured(str(device), threads)


def by_torch_name(name: str) -> Device | None:
    """The data of the device that torch.cuda.get_device_name gives this name, if it is known."""
    for key, (_, _, pattern) in _DATA_SHEETS.items():
        if re.fullmatch(pattern, name):
            return DEVICES[key]
    return None


def mfu(tokens_per_second: float, costs: Costs, peak: float) -> float:
    """Model FLOPs utilization (PaLM, arXiv 2204.02311): the share of the peak spent on the model.

    Recomputation does not count. peak is the sum over all devices that read these tokens. On a CPU
    that multiplies bfloat16 faster than float32 the result can exceed 1.
    """
    return tokens_per_second * costs.training_flops_per_token / peak


@functools.cache
def _measured(device: str, threads: int) -> float:
    """The speed of the fastest matrix product of those that fit into the time.

    `threads` is there for the cache, which keeps one result for each number of them.
    """
    on_cpu = torch.device(device).type == "cpu"
    # A CPU gets small matrices: of many short products some are not disturbed by other processes.
    size, dtype = (512, torch.float32) if on_cpu else (4096, torch.bfloat16)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _MEASURING_SECONDS:
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading an element waits for the whole product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _main_memory() -> float:
    """The bytes of memory of this machine; infinite where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return float("inf")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
