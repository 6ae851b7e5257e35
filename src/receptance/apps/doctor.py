"""receptance doctor: say what this machine can do, and which commands install what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from receptance import __version__
from receptance.apps.console import Console
from receptance.apps.options import parse
from receptance.inference.measure import read_bandwidth
from receptance.ops import OPERATORS, available_backends, native
from receptance.ops.threads import available_cpus, usable_threads
from receptance.progress import say

# The optional packages as pip calls them, and the purpose of each.
_OPTIONAL = {
    "matplotlib": "plots",
    "datasets": "hub datasets, parquet",
    "tensorboard": "figures of a run",
    "wandb": "figures of a run",
    "transformers": "comparisons",
    "lm-eval": "evaluate --tasks",
    **dict.fromkeys(("starlette", "uvicorn", "msgspec", "prometheus-client"), "serve"),
    "llguidance": "JSON in serve",
}
_COMPILERS = ("c++", "g++", "clang++")
_REINSTALL = "pip install --force-reinstall --no-deps receptance"
# On Linux the default build of torch is one for CUDA.
_CUDA_TORCH = "pip install --force-reinstall torch"
# The instruction sets that native kernels use or could use, by their names in Linux.
_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
# The seconds that a program has to print its version.
_PATIENCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what this machine and installation can do, and how to get what is missing."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ("receptance doctor --bandwidth",)

    bandwidth: bool = False
    """Also measure how fast memory is read, which limits how fast a model generates tokens."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    found: str
    fix: str | None = None
    """The command that installs what is missing; None if nothing is missing."""


def main(argv: list[str]) -> None:
    """Parse, collect the findings, print them."""
    options = parse(Options, argv, "receptance doctor")
    found = findings()
    if options.bandwidth:
        found["memory"] = _bandwidth()
    if options.json:
        print(json.dumps({name: dataclasses.asdict(x) for name, x in found.items()}, indent=1))
        return
    for name, finding in found.items():
        fix = "" if finding.fix is None else f"; {finding.fix}"
        say(Console(), f"{name:16} {finding.found}{fix}")


def findings() -> dict[str, Finding]:
    """The lines of the report by name, in order."""
    return {
        "receptance": Finding(f"{__version__} on Python {platform.python_version()}"),
        "CPU": _cpu(),
        "torch": _torch(),
        "compiler": _compiler(),
        "native kernels": _native(),
        **{f"{x} on cpu": Finding(", ".join(available_backends("cpu", x))) for x in OPERATORS},
        "GPU": _gpu(),
        "GPU driver": _driver(),
        "triton": _triton(),
        **{package: _optional(package) for package in _OPTIONAL},
    }


# ---- the processor ------------------------------------------------------------------------------


def _cpu() -> Finding:
    about = _cpuinfo()
    name = about.get("model name") or platform.processor() or platform.machine()
    flags = (about.get("flags") or about.get("Features") or "").split()
    known = ", ".join(x for x in _INSTRUCTIONS if x in flags)
    has = known or f"what torch calls {torch.backends.cpu.get_cpu_capability()}"
    usable = f"{available_cpus()} of {os.cpu_count()} cores usable"
    return Finding(f"{name}, {usable}; has {has}")


def _cpuinfo() -> dict[str, str]:
    """The fields of /proc/cpuinfo; none on systems other than Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _torch() -> Finding:
    build = "CPU build"
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    return Finding(f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _compiler() -> Finding:
    for name in _COMPILERS:
        if (path := shutil.which(name)) is not None:
            return Finding(_first_line(path, "--version") or path)
    mac = platform.system() == "Darwin"
    command = "xcode-select --install" if mac else "sudo apt install g++"
    return Finding("none, and the native kernels want one for C++17", command)


def _native() -> Finding:
    module = native.library()
    if module is None:
        return Finding("not built, so torch does it all, slower: with a compiler", _REINSTALL)
    threads = "share torch's threads" if module.shares_torch_threads() else "have their own threads"
    return Finding(f"use {', '.join(native.instruction_sets())} (the first of them); {threads}")


def _bandwidth() -> Finding:
    speed, how = read_bandwidth()
    return Finding(f"read at {speed / 1e9:.1f} GB/s by {usable_threads()} threads ({how})")


# ---- the GPU ------------------------------------------------------------------------------------


def _gpu() -> Finding:
    try:
        if torch.cuda.is_available():
            return Finding("; ".join(map(_one_gpu, range(torch.cuda.device_count()))))
    except RuntimeError as error:  # torch raises this when the driver does not answer.
        return Finding(f"not usable: {str(error).splitlines()[0]}")
    if shutil.which("nvidia-smi") is not None and torch.version.cuda is None:
        return Finding("there is an NVIDIA driver, but this torch was built without CUDA",
                       _CUDA_TORCH)  # fmt: skip
    return Finding("none that torch can use")


def _one_gpu(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    backends = [f"{x} {', '.join(available_backends(f'cuda:{index}', x))}" for x in OPERATORS]
    size = about.total_memory / 2**30
    return f"{about.name}, {size:.0f} GiB, sm_{about.major}{about.minor}, {'; '.join(backends)}"


def _driver() -> Finding:
    if (path := shutil.which("nvidia-smi")) is None:
        return Finding("none of NVIDIA's")
    version = _first_line(path, "--query-gpu=driver_version", "--format=csv,noheader")
    return Finding(version or "nvidia-smi does not answer")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is not None:
        able = any(map(shutil.which, ("gcc", "clang")))
        fix = None if able else "no C compiler to launch them with: apt install gcc python3-dev"
        return Finding(f"{_version('triton')} (GPU kernels)", fix if torch.version.cuda else None)
    if torch.version.cuda is None:
        return Finding("absent (GPU kernels): it comes with a CUDA build of torch")
    return Finding("absent (GPU kernels)", "pip install triton")


# ---- packages and programs ----------------------------------------------------------------------


def _optional(package: str) -> Finding:
    purpose = _OPTIONAL[package]
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return Finding(f"absent ({purpose})", f"pip install '{_wanted(package)}'")
    return Finding(f"{_version(package)} ({purpose})")


def _wanted(package: str) -> str:
    """A package with the releases that this one works with, as pip takes it."""
    try:
        wants = importlib.metadata.requires("receptance")
    except importlib.metadata.PackageNotFoundError:  # its files are here, and it was not installed
        wants = None
    for line in wants or ():
        if re.match(rf"{package}\b", wanted := line.partition(";")[0].strip()):
            return wanted
    return package


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def _first_line(*command: str) -> str | None:
    """The first line that a program prints; None if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else None
