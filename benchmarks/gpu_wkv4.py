"""The WKV-4 kernels for GPUs against the memory roof and against a walk over time.

    python benchmarks/gpu_wkv4.py [--shapes 8x4096x768 4x4096x2048] [--rounds 30] [--json FILE]

Checks both against float64 first. Times are of CUDA graphs, between events, the median, with the
second-level cache filled with something else before each run: what the GPU takes, without Python's
launches. Bytes are the fewest possible (forward: key, value, out; backward: key, value and three
gradients), and shares are of the bandwidth that a copy reaches in the same run. Every new width
compiles eight kernels, by estimate in two minutes. JSON on the last line, also when it is
interrupted, and after each measurement in a file.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import report_as_found
from torch import Tensor

from receptance.ops import WKVState, triton_wkv4, wkv4
from receptance.ops.arguments import BackwardInputs, Inputs

Shape = tuple[int, int, int]
SHAPES: list[Shape] = [
    (8, 4096, 768),
    *((8, time, 768) for time in (1024, 2048, 8192)),
    *((4, 4096, width) for width in (1024, 2048, 2560, 4096, 5120)),
]
# Whole tiles, as all those that are timed; parts of them; one token.
CHECKED: list[Shape] = [(2, 512, 96), (2, 600, 96), (2, 1, 96)]
LIMITS = {"out": 2.5e-3, "key": 2.5e-3, "value": 2.5e-3, "bonus": 5e-6, "log_decay": 5e-5}
STATE_LIMIT = 1e-5
STATE = ("numerator", "denominator")
NAMES = ("log_decay", "bonus", "key", "value")
FLUSH = 512 * 2**20


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="BxTxC")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="a file for the results, from the first on")
    options = parser.parse_args()
    if not (torch.cuda.is_available() and triton_wkv4.is_available()):
        print("this benchmark needs a GPU with CUDA and Triton", file=sys.stderr)
        raise SystemExit(2)
    report_as_found(found(options.shapes, options.rounds), options.json)


def shape_of(text: str) -> Shape:
    """Rows, tokens and channels."""
    batch, time, width = map(int, text.split("x"))
    return batch, time, width


def found(shapes: list[Shape], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """All errors, then all times."""
    for shape in CHECKED:
        yield "B{} T{} C{} error / limit".format(*shape), gate("cuda", shape)
    copied = 2 * FLUSH / milliseconds(copy(), rounds) / 1e6
    yield "copy", {"GB/s": copied}
    for shape in shapes:
        yield from measure(shape, copied, rounds)


def measure(shape: Shape, copied: float, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each way."""
    inputs, grad = make_inputs(*shape, "cuda")
    for way, tensors in (("forward", 3), ("backward", 5)):
        ours, walk = (getattr(kernels, way)(inputs, grad) for kernels in (Ours, Walk))
        ms, slow = milliseconds(ours, rounds), milliseconds(walk, rounds)
        moved = tensors * grad.numel() * grad.element_size() / 1e6
        figures = {"ms": ms, "MB": moved, "GB/s": moved / ms, "of copy": moved / ms / copied}
        title = "B{} T{} C{} ".format(*shape) + way
        yield title, figures | {"walk ms": slow, "times the walk": slow / ms}


class Ours:
    """The kernels of the package, ready to be called again and again."""

    @staticmethod
    def start(inputs: dict[str, Tensor], state: WKVState | None) -> Inputs:
        """What the forward pass takes; None: on rows that have seen nothing."""
        batch, _, width = inputs["key"].shape
        state = state or WKVState.empty(batch, width, device=inputs["key"].device)
        return Inputs(**inputs, **state._asdict())

    @classmethod
    def forward(
        cls,
        inputs: dict[str, Tensor],
        grad: Tensor,
        state: WKVState | None = None,
        variant: str = "",
    ) -> Callable[[], Any]:
        """The forward pass."""
        return functools.partial(triton_wkv4.forward, cls.start(inputs, state), variant)

    @classmethod
    def backward(
        cls,
        inputs: dict[str, Tensor],
        grad: Tensor,
        state: WKVState | None = None,
        variant: str = "",
        after: tuple[Tensor, Tensor] | None = None,
    ) -> Callable[[], Any]:
        """The backward pass, the state included; after: gradients of the final one, or zeros."""
        x = cls.start(inputs, state)
        starts = triton_wkv4.forward(x, variant)[-1]
        after = after or (torch.zeros_like(x.numerator),) * 2
        taken = BackwardInputs(grad, *after, **inputs, starts=starts)
        return functools.partial(triton_wkv4.backward, taken, variant)


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


def make_state(batch: int, width: int, device: str) -> tuple[WKVState, tuple[Tensor, Tensor]]:
    """A state that has seen something, and gradients of the numerator and denominator after."""
    generator = torch.Generator(device).manual_seed(1)
    n, d, o, *after = torch.randn(5, batch, width, generator=generator, device=device)
    return WKVState(n, d.exp(), o), (after[0], after[1])


def gate(device: str, shape: Shape) -> dict[str, float]:
    """The largest error of each way to run a shape, as a share of its limit.

    Errors are relative root mean squares against float64. Exits when one is too large, or when a
    second run does not give the same bits.
    """
    inputs, grad = make_inputs(*shape, device)
    state, after = make_state(shape[0], shape[2], device)
    walked = Walk.forward(inputs, grad)(), *Walk.backward(inputs, grad)()
    fresh, unused = (
        WKVState.empty(shape[0], shape[2], device=device),
        (torch.zeros_like(after[0]),) * 2,
    )
    wanted, _ = exact(inputs, fresh, grad, unused)
    errors = {"Walk": worst("Walk", dict(zip(("out", *NAMES), walked, strict=True)), wanted)}
    wanted, exponent = exact(inputs, state, grad, after)
    for variant in ("step",) if shape[1] == 1 else ("chunked", "serial"):
        got, again = (ours(inputs, state, grad, after, exponent, variant) for _ in range(2))
        if not all(torch.equal(got[name], again[name]) for name in got):
            raise SystemExit(f"{variant} does not give the same bits again")
        errors[variant] = worst(variant, got, wanted)
    return errors


def exact(
    inputs: dict[str, Tensor], state: WKVState, grad: Tensor, after: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Output, final state and all gradients by the definition in float64; the final exponent."""
    wide = {name: x.double().requires_grad_() for name, x in inputs.items()}
    n, d = (x.double().requires_grad_() for x in state[:2])
    out, last = wkv4(**wide, state=WKVState(n, d, state[2].double()), backend="reference")
    results, upstream = (out, *last[:2]), [x.double() for x in (grad, *after)]
    grads = torch.autograd.grad(results, [*wide.values(), n, d], upstream)
    names = ("out", *(f"{x} after" for x in STATE), *inputs, *STATE)
    return dict(zip(names, (*(x.detach() for x in results), *grads), strict=True)), last[2].detach()


def ours(
    inputs: dict[str, Tensor],
    state: WKVState,
    grad: Tensor,
    after: tuple[Tensor, Tensor],
    exponent: Tensor,
    variant: str,
) -> dict[str, Tensor]:
    """The same by a variant; `after` and its final state belong to the frame of `exponent`."""
    out, n, d, o, _ = Ours.forward(inputs, grad, state, variant)()
    change = (o.double() - exponent).exp()
    ends = (after[0] * change).float(), (after[1] * change).float()
    grads = Ours.backward(inputs, grad, state, variant, ends)()
    last = {f"{name} after": x * change for name, x in zip(STATE, (n, d), strict=True)}
    return {"out": out} | last | dict(zip((*NAMES, *STATE), grads, strict=True))


def worst(what: str, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error by its limit; exits when that is too large."""
    errors = {name: relative(x, wanted[name]) for name, x in got.items()}
    for name, error in errors.items():
        if not error <= LIMITS.get(name, STATE_LIMIT):
            raise SystemExit(f"{what} is wrong: {name} is off by {error:.1e}")
    return max(error / LIMITS.get(name, STATE_LIMIT) for name, error in errors.items())


def relative(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of what is right, which may be nothing but 0."""
    size = exact.square().mean().sqrt().clamp(min=1e-30)
    return float((found.double() - exact).square().mean().sqrt() / size)


def copy() -> Callable[[], Any]:
    """A copy of many bytes."""
    source = torch.randn(FLUSH // 4, device="cuda")
    target = torch.empty_like(source)
    return functools.partial(target.copy_, source)


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """The median of as many runs of a CUDA graph, each with a cold cache."""
    run()  # compiles and tunes, which a graph cannot hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # Read, not written: what it leaves in the cache need not go back to memory while we time.
    flush = torch.randn(FLUSH // 4, device="cuda")
    times = []
    for _ in range(rounds + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
