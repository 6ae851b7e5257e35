"""receptance doctor: what this machine and installation can do, and the command for what is not."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from receptance import __version__
from receptance.ops import available_backends, native

# Optional packages, what each is for, and the extra that brings it.
_OPTIONAL = {
    "matplotlib": ("loss plots", "pip install 'receptance[plot]'"),
    "datasets": ("hub datasets, parquet", "pip install 'receptance[data]'"),
    "tensorboard": ("figures of a run", "pip install 'receptance[logs]'"),
    "wandb": ("figures of a run", "pip install 'receptance[logs]'"),
    "triton": ("GPU kernels", "comes with a CUDA build of torch"),
    "transformers": ("comparisons", "pip install transformers"),
}


@dataclass(frozen=True)
class Options:
    """Say what this machine and installation can do."""


def main(argv: list[str]) -> None:
    """Parse (there is only --help) and print the table."""
    tyro.cli(Options, args=argv, prog="receptance doctor")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, finding in findings().items():
        table.add_row(name, finding)
    Console().print(table)


def findings() -> dict[str, str]:
    """What there is to report, one line each."""
    found = {
        "receptance": f"{__version__} on Python {platform.python_version()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "native kernels": _native(),
        "wkv4 on cpu": ", ".join(available_backends("cpu")),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for package, (purpose, remedy) in _OPTIONAL.items():
        present = importlib.util.find_spec(package) is not None
        found[package] = f"present ({purpose})" if present else f"absent ({purpose}); {remedy}"
    return found


def _native() -> str:
    module = native.library()
    if module is None:
        return (
            "not built, so the chunked torch path is used; install a C++17 compiler (g++ or "
            "clang++) and reinstall receptance"
        )
    threads = "shares torch's threads" if module.shares_torch_threads() else "has its own threads"
    return f"{', '.join(native.instruction_sets())}; {threads}"
