"""The WKV-4 operator, forward and backward, against the reference loop in the same run.

    python benchmarks/wkv4.py [--batch 4 --time 1024 --width 768]

Checks every backend against float64 first. Prints ratios, then JSON on the last line.
"""

from __future__ import annotations

import argparse

import torch
from _common import report, time_in_turns
from torch import Tensor

from receptance.ops import available_backends, wkv4

LIMITS = {"out": 1e-6, "key": 5e-6, "value": 5e-6, "bonus": 5e-6, "log_decay": 5e-5}


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--time", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    inputs, grad = make_inputs(options.batch, options.time, options.width)
    backends = available_backends("cpu")
    for backend in backends[:-1]:
        check(backend, inputs, grad)
    both = time_in_turns(
        {name: lambda name=name: step(name, inputs, grad) for name in backends},
        rounds=options.rounds,
    )
    forward = time_in_turns(
        {name: lambda name=name: forward_only(name, inputs) for name in backends},
        rounds=options.rounds,
    )
    elements = grad.numel()
    results = {"shape": f"B{options.batch} T{options.time} C{options.width} float32"}
    for name in backends:
        results[f"{name}: forward + backward, ms"] = both[name] * 1e3
        results[f"{name}: times the reference loop"] = both["reference"] / both[name]
        per_thread = forward[name] * torch.get_num_threads() / elements
        results[f"{name}: forward, ns per element and thread"] = per_thread * 1e9
    report(results)


def make_inputs(batch: int, time: int, width: int) -> tuple[dict[str, Tensor], Tensor]:
    """Decays as a new model has them, keys and values as layer norms make them."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "log_decay": -torch.exp(torch.linspace(-5, 3, width)),
        "bonus": torch.randn(width, generator=generator),
        "key": torch.randn(batch, time, width, generator=generator),
        "value": torch.randn(batch, time, width, generator=generator),
    }
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    return inputs, torch.randn(batch, time, width, generator=generator)


def step(backend: str, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    out, _ = wkv4(**inputs, backend=backend)
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    return {"out": out.detach()} | dict(zip(inputs, grads, strict=True))


@torch.no_grad()
def forward_only(backend: str, inputs: dict[str, Tensor]) -> None:
    """The forward pass without a gradient."""
    wkv4(**inputs, backend=backend)


def check(backend: str, inputs: dict[str, Tensor], grad: Tensor) -> None:
    """Relative root-mean-square error against float64; exits when it is too large."""
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact = step("chunked", wide, grad.double())
    found = step(backend, inputs, grad)
    for name, limit in LIMITS.items():
        error = (found[name] - exact[name]).square().mean().sqrt()
        relative = float(error / exact[name].square().mean().sqrt())
        if not relative <= limit:
            raise SystemExit(f"{backend} is wrong: {name} is off by {relative:.1e} (> {limit})")


if __name__ == "__main__":
    main()
