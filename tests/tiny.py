"""Models and tokenizers small enough for a test, in which nevertheless every part matters."""

import functools

import torch

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.tokenizer import BPETokenizer

TEXT = "".join(f"{n} little foxes jump over {n * n} lazy dogs, naïvely — 狐.\n" for n in range(120))


def make_model(
    vocab_size: int = 256,
    *,
    width: int = 16,
    layers: int = 2,
    seed: int = 1,
    version: int = 4,
    **extras: float,
) -> Model:
    """Random everywhere: with the official starting values time mixing has no effect."""
    sizes = ModelConfig(
        version=version, vocab_size=vocab_size, width=width, num_layers=layers, extras=extras
    )
    model = Model(sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The shares of RWKV-6, which these make, would amplify rounding from layer to layer.
            size = 0.05 if "time_maa_w" in name and name[-1].isdigit() else 0.3
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@functools.cache
def small_bpe(vocab_size: int = 300) -> BPETokenizer:
    return BPETokenizer.train([TEXT], vocab_size)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits agree."""
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and torch.equal(x, other[name]) for name, x in one.items()
    )
