"""What the tests of wkv7 share: the backends, their inputs, and oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.ops import arguments, available_backends, wkv7, wkv7_chunked

CHUNK = wkv7_chunked.CHUNK
MODEL = 0.6065306597126334
"""The strongest decay of the model, as a logarithm."""

every_backend = pytest.mark.parametrize(
    "backend", [x for x in available_backends("cpu", "wkv7") if x != "reference"]
)
with_reference = pytest.mark.parametrize("backend", available_backends("cpu", "wkv7"))


class Inputs(arguments.Wkv7Inputs):
    """The tensors that get gradients, then the masks."""

    def to(self, dtype: torch.dtype) -> Inputs:
        """The inputs in dtype; decays and state as wide as the operator keeps them."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kept = ("log_decay", "state")
        changes = {n: getattr(self, n).to(wide if n in kept else dtype) for n in GRADIENTS}
        return self._replace(**changes)

    def clone(self) -> Inputs:
        return Inputs(*(None if x is None else x.clone() for x in self))


GRADIENTS = arguments.Wkv7Inputs._fields[:7]


def draw(
    seed: int,
    batch: int,
    time: int,
    heads: int = 2,
    size: int = 8,
    *,
    dtype: torch.dtype = torch.float64,
    decays: tuple[float, float] = (-MODEL, 0),
    fresh: bool = False,
    masks: bool = False,
) -> Inputs:
    """Inputs such as the model makes; log_decay is uniform, masks are resets and lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, time, heads, size

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    kappa = F.normalize(normal(*shape), dim=-1)
    rate = torch.rand(shape, generator=generator, dtype=torch.float64)
    low, high = decays
    log_decay = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    state = normal(batch, heads, size, size) * (not fresh)
    resets = torch.rand(batch, time, generator=generator) < 0.1 if masks else None
    lengths = torch.randint(time + 1, (batch,), generator=generator) if masks else None
    key = normal(*shape) / size**0.5
    values = normal(*shape), log_decay, key, normal(*shape), -kappa, kappa * rate, state
    return Inputs(*values, resets, lengths).to(dtype)


def run(backend: str | None, x: Inputs) -> tuple[Tensor, Tensor]:
    """The operator through one of the backends."""
    return wkv7(*x[:7], resets=x.resets, lengths=x.lengths, backend=backend)


def serial(x: Inputs) -> tuple[Tensor, Tensor]:
    """The first oracle: the definition, one token after another, in float64."""
    return run("reference", x.to(torch.float64))


def products(x: Inputs) -> tuple[Tensor, Tensor]:
    """The second oracle: every token's contribution, carried on by a product of whole matrices.

    A token multiplies the state from the right with diag(w) + a b^T. It is seen by a later one if
    no reset lies between them.
    """
    x = x.to(torch.float64)
    batch, time = x.key.shape[:2]
    outputs, states = torch.zeros_like(x.value), x.state.clone()
    for b in range(batch):
        length = time if x.lengths is None else int(x.lengths[b])
        sources = [(x.state[b], 0)]
        for t in range(length):
            move = torch.diag_embed(x.log_decay[b, t].exp())
            move = move + x.removal[b, t, :, :, None] * x.replacement[b, t, :, None, :]
            if x.resets is not None and x.resets[b, t]:
                sources = []
            sources = [(matrix @ move, age) for matrix, age in sources]
            sources.append((x.value[b, t, :, :, None] * x.key[b, t, :, None, :], t))
            whole = sum(matrix for matrix, _ in sources)
            outputs[b, t] = (whole @ x.receptance[b, t, :, :, None])[..., 0]
            states[b] = whole
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
