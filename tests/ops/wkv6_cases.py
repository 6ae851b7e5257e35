"""What the tests of wkv6 share: the backends, their inputs, and oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from receptance.ops import arguments, available_backends, wkv6, wkv6_chunked

CHUNK = wkv6_chunked.CHUNK
USUAL = (-7.0, 1.5)
"""The range of time_decay in models: log_decay is minus its exponential."""

every_backend = pytest.mark.parametrize(
    "backend", [x for x in available_backends("cpu", "wkv6") if x != "reference"]
)
with_reference = pytest.mark.parametrize("backend", available_backends("cpu", "wkv6"))


class Inputs(arguments.Wkv6Inputs):
    """The tensors that get gradients, then the masks."""

    def to(self, dtype: torch.dtype) -> Inputs:
        """The inputs in dtype; decays and state as wide as the operator keeps them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kept = ("log_decay", "bonus", "state")
        changes = {n: getattr(self, n).to(wide if n in kept else dtype) for n in GRADIENTS}
        return self._replace(**changes)

    def clone(self) -> Inputs:
        return Inputs(*(None if x is None else x.clone() for x in self))


GRADIENTS = arguments.Wkv6Inputs._fields[:6]


def draw(
    seed: int,
    batch: int,
    time: int,
    heads: int = 2,
    size: int = 8,
    *,
    dtype: torch.dtype = torch.float64,
    decays: tuple[float, float] = USUAL,
    fresh: bool = False,
    masks: bool = False,
) -> Inputs:
    """Inputs such as the model makes; log_decay is -e^x with uniform x."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, time, heads, size

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    low, high = decays
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    log_decay = -(low + (high - low) * uniform).exp()
    state = normal(batch, heads, size, size) * (not fresh)
    resets = torch.rand(batch, time, generator=generator) < 0.1 if masks else None
    lengths = torch.randint(time + 1, (batch,), generator=generator) if masks else None
    key = normal(*shape) / size**0.5
    values = normal(*shape), log_decay, key, normal(*shape), normal(heads, size), state
    return Inputs(*values, resets, lengths).to(dtype)


def run(backend: str | None, x: Inputs) -> tuple[Tensor, Tensor]:
    """The operator through one of the backends."""
    return wkv6(*x[:6], resets=x.resets, lengths=x.lengths, backend=backend)


def serial(x: Inputs) -> tuple[Tensor, Tensor]:
    """The first oracle: the definition, one token after another, in float64."""
    return run("reference", x.to(torch.float64))


def weights(x: Inputs) -> tuple[Tensor, Tensor]:
    """The second oracle: every output as a weighted sum of values, with all pairs written out.

    A token is seen by a later one if no reset lies between them.
    """
    x = x.to(torch.float64)
    batch, time = x.key.shape[:2]
    outputs, states = torch.zeros_like(x.value), x.state.clone()
    for b in range(batch):
        length = time if x.lengths is None else int(x.lengths[b])
        state, sources = x.state[b], []
        for t in range(length):
            if x.resets is not None and x.resets[b, t]:
                state, sources = torch.zeros_like(state), []
            r, w, k, v = (part[b, t] for part in x[:4])
            outputs[b, t] = (
                torch.einsum("hk,hkv->hv", r, state) + (r * x.bonus * k).sum(-1, keepdim=True) * v
            )
            for key, value in sources:
                outputs[b, t] += (r * key).sum(-1, keepdim=True) * value
            state = state * w.exp()[..., None]
            sources = [(key * w.exp(), value) for key, value in sources] + [(k, v)]
        states[b] = state + sum(key[..., None] * value[:, None] for key, value in sources)
    return outputs, states


class Result(NamedTuple):
    """Output, state, and by name the gradients of a random linear function of both."""

    out: Tensor
    state: Tensor
    grads: dict[str, Tensor]


def evaluate(operator: Callable[[Inputs], tuple[Tensor, Tensor]], x: Inputs) -> Result:
    """Run an operator forward and backward."""
    generator = torch.Generator().manual_seed(1)
    leaves = {name: getattr(x, name).detach().clone().requires_grad_() for name in GRADIENTS}
    seen = operator(x._replace(**leaves))
    # Weights that bfloat16 can hold, so that every dtype differentiates the same function.
    weights = [torch.randn(part.shape, generator=generator).bfloat16().to(part) for part in seen]
    grads = torch.autograd.grad(seen, list(leaves.values()), weights, materialize_grads=True)
    return Result(*(part.detach() for part in seen), dict(zip(GRADIENTS, grads, strict=True)))


def truth(x: Inputs) -> Result:
    """The float64 oracle on these very inputs."""
    return evaluate(serial, x.to(torch.float64))


def evaluate_backend(backend: str, x: Inputs) -> Result:
    """One of the backends in the dtype of the inputs."""
    return evaluate(lambda x: run(backend, x), x)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    difference = (got.double() - want.double()).square().mean().sqrt()
    return float(difference / want.double().square().mean().sqrt().clamp(min=1e-300))


def errors(got: Result, want: Result) -> dict[str, float]:
    """The relative error of every part of a result."""
    pairs = {"out": (got.out, want.out), "state": (got.state, want.state)}
    pairs |= {f"gradient of {name}": (got.grads[name], want.grads[name]) for name in GRADIENTS}
    return {name: relative_error(*pair) for name, pair in pairs.items() if pair[0].numel()}


def assert_same(got: Result, want: Result, bound: float) -> None:
    """Two results agree in every part to a relative error."""
    wrong = {name: error for name, error in errors(got, want).items() if not error <= bound}
    assert not wrong, f"beyond {bound:.0e}: {wrong}"
