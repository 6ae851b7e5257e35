"""What all Triton kernels need before they are launched; importing this does not import Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# How many rounds of a loop are under way at a time; with three the registers do not suffice.
STAGES = 2
# States are divided over programs until there are so many, but not into narrower tiles than tensor
# cores take.
ENOUGH, NARROWEST = 256, 16

_INSTALLED = importlib.util.find_spec("triton") is not None


def is_available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def check_launcher() -> None:
    """Raise ValueError if Triton cannot build what launches its kernels on this machine."""
    runtime = importlib.import_module("triton.runtime")
    try:
        _ = runtime.driver.active
    except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError) as error:
        failed = isinstance(error, subprocess.CalledProcessError)
        reason = "the C compiler failed" if failed else str(error).partition("\n")[0]
        raise ValueError(
            f"Triton cannot build what launches its kernels: {reason}. It wants gcc and Python's "
            "headers (apt install gcc python3-dev); without them choose another backend"
        ) from error


@functools.cache
def kernel_of(module: str, name: str) -> tuple[Any, bool]:
    """A kernel of receptance.ops, and whether it is interpreted (TRITON_INTERPRET=1).

    ValueError if it cannot be launched here.
    """
    triton = importlib.import_module("triton")
    kernel = getattr(importlib.import_module(f"receptance.ops.{module}"), name)
    interpreted = not isinstance(kernel, triton.JITFunction)
    if not interpreted:
        check_launcher()
    return kernel, interpreted


class Launcher(NamedTuple):
    """Launches the kernels of a module over [B,T,H,N], on the device of the tensors."""

    module: str
    shape: Sequence[int]  # B, T, H and N
    chunk: int
    warps: Mapping[str, int]  # of each kernel

    def chunks(self, name: str, *tensors: Tensor | None) -> None:
        """A program for every chunk of every head of every row of the batch."""
        batch, time, heads, size = self.shape
        grid = batch * heads, -(-time // self.chunk)
        self._run(name, grid, *tensors, time, heads, size, self.chunk)

    def states(self, name: str, *tensors: Tensor | None) -> None:
        """Programs for parts of a state, which belong to some of its values."""
        batch, time, heads, size = self.shape
        part = size
        while part > NARROWEST and batch * heads * (size // part) < ENOUGH:
            part //= 2
        grid = batch * heads, size // part
        self._run(name, grid, *tensors, time, heads, size, part, self.chunk)

    def _run(self, name: str, grid: tuple[int, int], *arguments: Tensor | int | None) -> None:
        kernel, interpreted = kernel_of(self.module, name)
        options = {"num_warps": self.warps[name], "num_stages": STAGES, "enable_fp_fusion": True}
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **({} if interpreted else options))


def readable(x: Any) -> dict[str, Any]:
    """The tensors of a NamedTuple as kernels read them: contiguous, and resets as bytes."""
    fields = {name: y.contiguous() for name, y in x._asdict().items() if y is not None}
    if x.resets is not None:
        fields["resets"] = fields["resets"].view(torch.uint8)
    return fields


def fits(state: Tensor) -> bool:
    """Whether a state can be divided into tiles of float32, whose sides are powers of two."""
    return state.dtype == torch.float32 and state.shape[-1] in (16, 32, 64, 128)
