"""What the tests of the operator share: the kernels, their inputs, and oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from receptance.ops import WKVState, arguments, native, reference, triton_wkv4, wkv4
from receptance.ops.arguments import BackwardInputs

CHUNK = native.CHUNK  # the kernels keep the state at the start of every so many tokens
NO_NATIVE = "the C++ kernels were not built"


# Triton's kernels run on a GPU, or else, slowly, in its interpreter: test_triton_wkv4.py.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = ["triton-serial", "triton-chunked"]
ON_GPU = ["triton", *TRITON] if DEVICE == "cuda" and triton_wkv4.is_available() else []


def _kernels() -> list:
    """Every piece of code that computes the operator on this machine."""
    if not native.is_available():
        skipped = pytest.param("native", marks=pytest.mark.skip(reason=NO_NATIVE))
        return ["chunked", skipped, *ON_GPU]
    # The public name `native` runs the fastest instruction set; the others need asking for.
    slower = [f"native-{name}" for name in native.instruction_sets()[1:]]
    return ["chunked", "native", *slower, *ON_GPU]


def _backends() -> list:
    missing = pytest.mark.skipif(not native.is_available(), reason=NO_NATIVE)
    return ["chunked", pytest.param("native", marks=missing), *ON_GPU[:1]]


every_kernel = pytest.mark.parametrize("kernel", _kernels())
every_backend = pytest.mark.parametrize("backend", _backends())


class Inputs(arguments.Inputs):
    """The tensors that get gradients, then the rest."""

    @property
    def state(self) -> WKVState:
        return WKVState(self.numerator, self.denominator, self.exponent)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Key and value in dtype, the rest as wide as the operator keeps it."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        narrow = {"key": self.key.to(dtype), "value": self.value.to(dtype)}
        rest = ("log_decay", "bonus", "numerator", "denominator", "exponent")
        return self._replace(**narrow, **{name: getattr(self, name).to(wide) for name in rest})

    def clone(self) -> Inputs:
        return Inputs(*(None if x is None else x.clone() for x in self))

    def placed(self, kernel: str) -> Inputs:
        """The same where the kernel can read it."""
        device = DEVICE if kernel.startswith("triton") else "cpu"
        return Inputs(*(None if x is None else x.to(device) for x in self))


GRADIENTS = Inputs._fields[:6]


def draw(
    seed: int,
    batch: int,
    time: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float64,
    decays: tuple[float, float] = (-6, 2),
    fresh: bool = False,
    masks: bool = False,
) -> Inputs:
    """Random inputs; log_decay is -e^x for x evenly over `decays`, masks are resets and lengths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = WKVState.empty(batch, width, dtype=torch.float64)
    if not fresh:
        exponent = normal(batch, width)
        state = WKVState(normal(batch, width), normal(batch, width).exp(), exponent)
    resets = torch.rand(batch, time, generator=generator) < 0.1 if masks else None
    lengths = torch.randint(time + 1, (batch,), generator=generator) if masks else None
    return Inputs(
        -torch.linspace(*decays, width, dtype=torch.float64).exp(),
        normal(width),
        2 * normal(batch, time, width),
        normal(batch, time, width),
        *state,
        resets,
        lengths,
    ).to(dtype)


class _Chosen(torch.autograd.Function):
    """An instruction set, or a variant, that the public operator would not choose."""

    @staticmethod
    def forward(ctx, module, name, *inputs):
        x = Inputs(*inputs)
        *outputs, starts = module.forward(x, name)
        ctx.save_for_backward(*x[:4], starts, x.resets, x.lengths)
        ctx.module, ctx.name = module, name
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_out, grad_numerator, grad_denominator, _):
        x = BackwardInputs(grad_out, grad_numerator, grad_denominator, *ctx.saved_tensors)
        return None, None, *ctx.module.backward(x, ctx.name), None, None, None


def run(kernel: str, x: Inputs) -> tuple[Tensor, WKVState]:
    """The operator through one of the kernels."""
    backend, _, choice = kernel.partition("-")
    x = x.placed(kernel)
    if choice:
        module = {"native": native, "triton": triton_wkv4}[backend]
        out, *after = _Chosen.apply(module, choice, *x)
    elif backend == "triton":  # not by wkv4, which knows of no interpreter
        out, *after = torch.ops.receptance.wkv4.default(*x, backend)[:4]
    else:
        return wkv4(*x[:4], x.state, resets=x.resets, lengths=x.lengths, backend=backend)
    return out.cpu(), WKVState(*(part.cpu() for part in after))


def serial(x: Inputs) -> tuple[Tensor, WKVState]:
    """The first oracle: the definition, one token after another, in float64."""
    x = x.to(torch.float64)
    out, state = reference.wkv4(x)
    return out, WKVState(*state)


def quadratic(x: Inputs) -> tuple[Tensor, WKVState]:
    """The second oracle: equation 16 over all pairs of positions at once, with no recurrence.

    The initial state is one more term of both sums, at a distance of t tokens. A position counts
    for another when no reset lies between them, and for the final state when its row has it.
    """
    x = x.to(torch.float64)
    batch, time, _ = x.key.shape
    position = torch.arange(time)
    document = torch.zeros(batch, time, dtype=torch.int64)
    if x.resets is not None:
        document = x.resets.long().cumsum(1)
    length = torch.full((batch,), time) if x.lengths is None else x.lengths

    def weighted(exponent: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the weights of the tokens [B,S,T,C] and of the state [B,S,C] -> sums, frame."""
        top = torch.maximum(exponent.amax(2), first).detach()
        weight, before = (exponent - top[:, :, None]).exp(), (first - top).exp()
        numerator = (weight * x.value[:, None]).sum(2) + before * x.numerator[:, None]
        return numerator, weight.sum(2) + before * x.denominator[:, None], top

    never = torch.tensor(-torch.inf, dtype=torch.float64)
    distance = position[:, None] - 1 - position[None]
    exponent = x.key[:, None] + distance.clamp(min=0)[None, :, :, None] * x.log_decay
    exponent = torch.where(distance[None, :, :, None] < 0, x.bonus + x.key[:, None], exponent)
    seen = (distance >= -1) & (document[:, :, None] == document[:, None])
    exponent = torch.where(seen[..., None], exponent, never)
    first = x.exponent[:, None] + position[None, :, None] * x.log_decay
    first = torch.where((document == 0)[..., None], first, never)
    numerator, denominator, _ = weighted(exponent, first)
    out = torch.where((position < length[:, None])[..., None], numerator / denominator, 0)

    last = document.gather(1, (length[:, None] - 1).clamp(min=0))
    age = length[:, None] - 1 - position
    exponent = x.key + age.clamp(min=0)[..., None] * x.log_decay
    exponent = torch.where(((age >= 0) & (document == last))[..., None], exponent, never)
    first = x.exponent + length[:, None] * x.log_decay
    first = torch.where((last == 0) | (length[:, None] == 0), first, never)
    state = weighted(exponent[:, None], first[:, None])
    return out, WKVState(*(part[:, 0] for part in state))


class Result(NamedTuple):
    """Output, state, and by name the gradients of a random linear function of both."""

    out: Tensor
    state: WKVState
    grads: dict[str, Tensor]


def evaluate(
    operator: Callable[[Inputs], tuple[Tensor, WKVState]], x: Inputs, frame: Tensor | None = None
) -> Result:
    """Run an operator forward and backward.

    Of a state only numerator e^exponent and denominator e^exponent mean anything. The linear
    function sees those, divided by e^frame, where frame is the exponent of the truth: None when
    the operator is the truth itself.
    """
    generator = torch.Generator().manual_seed(1)
    leaves = {name: getattr(x, name).detach().clone().requires_grad_() for name in GRADIENTS}
    out, state = operator(x._replace(**leaves))
    frame = state.exponent if frame is None else frame
    scale = (state.exponent - frame).detach().exp()
    seen = (out, state.numerator * scale, state.denominator * scale)
    # Weights that bfloat16 can hold, so that every dtype differentiates the same function.
    weights = [torch.randn(part.shape, generator=generator).bfloat16().to(part) for part in seen]
    grads = torch.autograd.grad(seen, list(leaves.values()), weights, materialize_grads=True)
    state = WKVState(*(part.detach() for part in state))
    return Result(out.detach(), state, dict(zip(GRADIENTS, grads, strict=True)))


def truth(x: Inputs) -> Result:
    """The float64 oracle on these very inputs."""
    return evaluate(serial, x.to(torch.float64))


def evaluate_kernel(kernel: str, x: Inputs, frame: Tensor) -> Result:
    """One of the kernels in the dtype of the inputs."""
    return evaluate(lambda x: run(kernel, x), x, frame.to(x.exponent))


def in_frame(state: WKVState, frame: Tensor) -> tuple[Tensor, Tensor]:
    """numerator and denominator of a state, with another exponent taken out of them, in float64."""
    scale = (state.exponent.double() - frame.double()).exp()
    return state.numerator.double() * scale, state.denominator.double() * scale


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    difference = (got.double() - want.double()).square().mean().sqrt()
    return float(difference / want.double().square().mean().sqrt().clamp(min=1e-300))


def errors(got: Result, want: Result) -> dict[str, float]:
    """The relative error of every part of a result."""
    pairs = {"out": (got.out, want.out)}
    parts = zip(in_frame(got.state, want.state.exponent), want.state[:2], strict=True)
    pairs |= dict(zip(("final numerator", "final denominator"), parts, strict=True))
    pairs |= {f"gradient of {name}": (got.grads[name], want.grads[name]) for name in GRADIENTS}
    return {name: relative_error(*pair) for name, pair in pairs.items() if pair[0].numel()}


def assert_same(got: Result, want: Result, bound: float) -> None:
    """Two results agree in every part to a relative error."""
    wrong = {name: error for name, error in errors(got, want).items() if not error <= bound}
    assert not wrong, f"beyond {bound:.0e}: {wrong}"
