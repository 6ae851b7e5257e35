"""What the tests of the model share: models without special weights, and what a state means."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.state import State


@torch.no_grad()
def randomize(model: Model, seed: int = 0) -> Model:
    """Weights such as training might leave: nothing zero, nothing symmetric, every gate in use."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("time_decay"):
            drawn = 8 * uniform - 6
        elif name.endswith(("maa_w1", "maa_w2", "decay_w1", "decay_w2")):
            drawn = 0.3 * normal / parameter.shape[-2] ** 0.5
        elif "time_mix" in name or ".x_" in name or "time_maa" in name:
            drawn = uniform
        elif ".ln" in name or name.startswith("ln"):
            drawn = 0.2 * normal + name.endswith("weight")
        elif parameter.dim() == 2 and not name.startswith("emb"):
            drawn = normal / parameter.shape[1] ** 0.5
        else:
            drawn = normal
        parameter.copy_(drawn)
    return model


@functools.cache
def deep_model(dtype: torch.dtype = torch.float32, version: int = 4) -> Model:
    """12 layers; not to be changed, since tests share it."""
    extras = {} if version == 4 else {"head_size": 8}
    config = ModelConfig(version=version, vocab_size=61, width=32, num_layers=12, extras=extras)
    return randomize(Model(config)).to(dtype).eval().requires_grad_(False)


def token_ids(seed: int, *shape: int, vocab_size: int = 61) -> Tensor:
    """Random token ids of that shape."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def meaning(state: State, frame: Tensor | None = None) -> dict[str, Tensor]:
    """A state's tensors in float64, with the exponent (or that of another state) taken out."""
    parts = {name: tensor.double() for name, tensor in state.tensors.items()}
    if "exponent" not in parts:
        return parts
    exponent = parts.pop("exponent")
    scale = (exponent - (exponent if frame is None else frame.double())).exp()
    return parts | {name: parts[name] * scale for name in ("numerator", "denominator")}


def assert_same_state(got: State, want: State, bound: float) -> None:
    """Two states say the same, to a bound both absolute and relative."""
    assert torch.equal(got.tokens, want.tokens)
    assert got.tensors.keys() == want.tensors.keys()
    frame = want.tensors.get("exponent")
    torch.testing.assert_close(meaning(got, frame), meaning(want, frame), rtol=bound, atol=bound)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    got, want = got.detach().double(), want.detach().double()
    difference = (got - want).square().mean().sqrt()
    return float(difference / want.square().mean().sqrt())
