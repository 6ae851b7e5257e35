"""Tiny RWKV-4 weights, and what every refusal must look like."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.names import tensor_shapes

TINY = ModelConfig(vocab_size=19, width=8, num_layers=3, ffn_width=24)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def official() -> dict[str, Tensor]:
    """Random tensors of a whole model; a test that changes something takes a copy of the dict."""
    generator = torch.Generator().manual_seed(4)
    shapes = tensor_shapes(TINY).items()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes}


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """Call a reader that must refuse a path with one ValueError line, and return that line."""

    def call(reader: Callable[[Path], object], path: Path) -> str:
        with pytest.raises(ValueError) as caught:
            reader(path)
        message = str(caught.value)
        assert type(caught.value) is ValueError
        assert "\n" not in message and len(message) < 1000
        assert path.name in message
        return message

    return call


@pytest.fixture(scope="session")
def assert_same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    """The same names, dtypes, shapes and bits."""

    def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].shape == tensor.shape, name
            assert torch.equal(found[name], tensor), name
            assert not found[name].requires_grad, name

    return check
