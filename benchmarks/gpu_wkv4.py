"""The WKV-4 kernels for GPUs against the memory roof and against a walk over time.

    python benchmarks/gpu_wkv4.py [--rounds 30]

Checks both against float64 first. Times are of CUDA graphs, between events, the median, with the
second-level cache overwritten before each run: what the GPU takes, without Python's launches.
Bytes are the fewest possible (forward: key, value, out; backward: key, value and three gradients),
and shares are of the bandwidth that a copy reaches in the same run. Prints JSON on the last line.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from _common import report
from torch import Tensor

from receptance.ops import WKVState, triton_wkv4, wkv4

SHAPES = [
    (8, 4096, 768),
    *((8, time, 768) for time in (1024, 2048, 8192)),
    *((4, 4096, width) for width in (1024, 2048, 2560, 4096, 5120)),
]
CHECKED = (2, 200, 96)
LIMITS = {"out": 2.5e-3, "key": 2.5e-3, "value": 2.5e-3, "bonus": 5e-6, "log_decay": 5e-5}
NAMES = ("log_decay", "bonus", "key", "value")
FLUSH = 512 * 2**20


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not (torch.cuda.is_available() and triton_wkv4.is_available()):
        print("this benchmark needs a GPU with CUDA and Triton", file=sys.stderr)
        raise SystemExit(2)
    gate("cuda")
    copied = 2 * FLUSH / milliseconds(copy(), options.rounds) / 1e6
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "copy, GB/s": copied}
    print(f"{'shape':28}{'ms':>9}{'MB':>8}{'GB/s':>8}{'of copy':>9}{'walk, ms':>10}{'ratio':>7}")
    for shape in SHAPES:
        results |= measure(shape, copied, options.rounds)
    report(results)


def measure(shape: tuple[int, int, int], copied: float, rounds: int) -> dict[str, float]:
    """A line of the table for each way."""
    inputs, grad = make_inputs(*shape, "cuda")
    results = {}
    for way, tensors in (("forward", 3), ("backward", 5)):
        ours, walk = (getattr(kernels, way)(inputs, grad) for kernels in (Ours, Walk))
        ms, slow = milliseconds(ours, rounds), milliseconds(walk, rounds)
        moved = tensors * grad.numel() * grad.element_size() / 1e6
        name = "B{} T{} C{} ".format(*shape) + way
        share, ratio = moved / ms / copied, slow / ms
        print(
            f"{name:28}{ms:9.4f}{moved:8.0f}{moved / ms:8.0f}{share:9.1%}{slow:10.3f}{ratio:7.1f}"
        )
        results |= {f"{name}, ms": ms, f"{name}, GB/s": moved / ms, f"{name}, of copy": share}
        results |= {f"{name}, walk, ms": slow, f"{name}, times the walk": ratio}
    return results


class Ours:
    """The kernels of the package, ready to be called again and again."""

    @staticmethod
    def start(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The arguments of the forward pass, on rows that have seen nothing."""
        batch, _, width = inputs["key"].shape
        state = WKVState.empty(batch, width, device=inputs["key"].device)
        return (*(inputs[name] for name in NAMES), *state)

    @classmethod
    def forward(cls, inputs: dict[str, Tensor], grad: Tensor) -> Callable[[], Any]:
        """The forward pass."""
        return functools.partial(triton_wkv4.forward, *cls.start(inputs), None, None)

    @classmethod
    def backward(cls, inputs: dict[str, Tensor], grad: Tensor) -> Callable[[], Any]:
        """The backward pass, the state included."""
        arguments = cls.start(inputs)
        starts = triton_wkv4.forward(*arguments, None, None)[-1]
        after = torch.zeros_like(arguments[4])
        return functools.partial(
            triton_wkv4.backward, grad, after, after, *arguments[:4], starts, None, None
        )


class Walk:
    """The same of the kernels that walk over time."""

    @staticmethod
    def forward(inputs: dict[str, Tensor], grad: Tensor) -> Callable[[], Any]:
        """The forward pass."""
        module = importlib.import_module("_serial_wkv4")
        return functools.partial(module.forward, *(inputs[name] for name in NAMES))

    @staticmethod
    def backward(inputs: dict[str, Tensor], grad: Tensor) -> Callable[[], Any]:
        """The backward pass."""
        module = importlib.import_module("_serial_wkv4")
        return functools.partial(module.backward, grad, *(inputs[name] for name in NAMES))


def make_inputs(batch: int, time: int, width: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Decays as a new model has them, keys and values as layer norms make them, in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    inputs = {
        "log_decay": -torch.exp(torch.linspace(-5, 3, width, device=device)),
        "bonus": normal(width),
        "key": normal(batch, time, width).bfloat16(),
        "value": normal(batch, time, width).bfloat16(),
    }
    return inputs, normal(batch, time, width).bfloat16()


def gate(device: str, shape: tuple[int, int, int] = CHECKED) -> dict[str, dict[str, float]]:
    """Relative root-mean-square errors against float64; exits when one is too large."""
    inputs, grad = make_inputs(*shape, device)
    wide = {name: x.double().requires_grad_() for name, x in inputs.items()}
    out, _ = wkv4(**wide, backend="reference")
    grads = torch.autograd.grad(out, list(wide.values()), grad.double())
    exact = {"out": out.detach()} | dict(zip(NAMES, grads, strict=True))
    errors = {}
    for kernels in (Ours, Walk):
        out = kernels.forward(inputs, grad)()
        out = out[0] if isinstance(out, tuple) else out
        found = {"out": out} | dict(zip(NAMES, kernels.backward(inputs, grad)(), strict=False))
        errors[kernels.__name__] = {name: relative(found[name], exact[name]) for name in exact}
        for name, error in errors[kernels.__name__].items():
            if not error <= LIMITS[name]:
                raise SystemExit(f"{kernels.__name__} is wrong: {name} is off by {error:.1e}")
    return errors


def relative(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of what is right."""
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def copy() -> Callable[[], Any]:
    """A copy of many bytes."""
    source = torch.zeros(FLUSH // 4, device="cuda")
    target = torch.empty_like(source)
    return functools.partial(target.copy_, source)


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """The median of as many runs of a CUDA graph, each with a cold cache."""
    run()  # compiles and tunes, which a graph cannot hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(FLUSH // 4, device="cuda")
    times = []
    for _ in range(rounds + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
