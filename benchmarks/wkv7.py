"""The WKV-7 operator, forward and backward, against the reference loop in the same run.

    python benchmarks/wkv7.py [--batch 4 --time 1024 --width 768 --longest 65536]
    python benchmarks/wkv7.py --device cuda --backends triton chunked --batch 8 --time 4096 \
        --width 4096

Checks every backend against float64 first. Then the time per token as a row gets longer, which
should stay the same. Prints ratios, then JSON on the last line.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _common import Progress, report, time_in_turns
from rich.console import Console
from torch import Tensor

from receptance.ops import available_backends, wkv7

HEAD_SIZE = 64
INPUTS = ("receptance", "log_decay", "key", "value", "removal", "replacement", "state")
LIMIT = 5e-6  # A relative root mean square, of every result.
SHORTEST = 1024  # Tokens of the row that the longer ones are compared with.


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--time", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", nargs="+", help="all that there are by default")
    options = parser.parse_args()
    if options.width % HEAD_SIZE:
        parser.error(f"--width is {options.width}; it must be a multiple of {HEAD_SIZE}")
    device = torch.device(options.device)
    backends = options.backends or available_backends(device, "wkv7")
    ours = [name for name in backends if name != "reference"]
    heads = options.width // HEAD_SIZE
    with Progress(Console(stderr=True)) as say:
        for backend in ours:
            say(f"checking {backend}")
            check(backend, *make_inputs(1, 200, heads, device))
        inputs, grad = make_inputs(options.batch, options.time, heads, device)

        def run(call: Callable[..., object], name: str) -> object:
            say(f"{name}: {call.__name__.replace('_', ' ')}")
            return call(name, inputs, grad)

        both, forward = (
            time_in_turns(
                {name: partial(run, call, name) for name in backends}, rounds=options.rounds
            )
            for call in (step, forward_only)
        )
        longer = growth(ours, options.longest, device, say)
    states = options.batch * options.time * heads
    results: dict[str, object] = {
        "shape": f"B{options.batch} T{options.time} C{options.width}, heads of 64, float32"
    }
    for name in backends:
        results[f"{name}: forward + backward, ms"] = both[name] * 1e3
        if "reference" in both:
            results[f"{name}: times the reference loop"] = both["reference"] / both[name]
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        results[f"{name}: forward, ns per token, head and thread"] = (
            forward[name] * threads / states * 1e9
        )
    report(results | longer)


def growth(
    backends: list[str], longest: int, device: torch.device, say: Callable[[str], None]
) -> dict[str, object]:
    """How much longer a token takes in long rows of two heads than in one of SHORTEST tokens."""
    results: dict[str, object] = {}
    base: dict[str, float] = {}
    length = SHORTEST
    while length <= longest:
        say(f"rows of {length:,} tokens")
        inputs, grad = make_inputs(1, length, 2, device)
        seconds = time_in_turns(
            {name: partial(step, name, inputs, grad) for name in backends}, rounds=3
        )
        for name, taken in seconds.items():
            per_token = taken / length
            ratio = per_token / base.setdefault(name, per_token)
            if length > SHORTEST:
                results[f"{name}: time per token, T {length:,} / T {SHORTEST:,}"] = ratio
        length *= 4
    return results


def make_inputs(
    batch: int, time: int, heads: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Decays, directions and rates as a model makes them, keys and values of one's size."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, time, heads, HEAD_SIZE)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    direction = F.normalize(normal(*shape), dim=-1)
    drawn = (
        normal(*shape),
        -math.exp(-0.5) * torch.sigmoid(3 * normal(*shape) - 3),
        normal(*shape) / HEAD_SIZE**0.5,
        normal(*shape),
        -direction,
        direction * torch.sigmoid(normal(*shape)),
        normal(batch, heads, HEAD_SIZE, HEAD_SIZE),
    )
    inputs = {name: x.to(device).requires_grad_() for name, x in zip(INPUTS, drawn, strict=True)}
    return inputs, normal(*shape).to(device)


def step(backend: str, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    out, _ = wkv7(**inputs, backend=backend)
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    return {"out": out.detach()} | dict(zip(inputs, grads, strict=True))


@torch.no_grad()
def forward_only(backend: str, inputs: dict[str, Tensor], _: Tensor) -> None:
    """The forward pass without a gradient."""
    wkv7(**inputs, backend=backend)


def check(backend: str, inputs: dict[str, Tensor], grad: Tensor) -> None:
    """Compare with the definition in float64; exits when the error is too large."""
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact = step("reference", wide, grad.double())
    for name, found in step(backend, inputs, grad).items():
        error = (found - exact[name]).square().mean().sqrt()
        relative = float(error / exact[name].square().mean().sqrt())
        if not relative <= LIMIT:
            raise SystemExit(f"{backend} is wrong: {name} is off by {relative:.1e} (> {LIMIT})")


if __name__ == "__main__":
    main()
