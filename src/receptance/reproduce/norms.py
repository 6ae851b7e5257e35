"""Norms of gradients in RWKV, torch's LSTM and torch's Transformer, of a loss at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.config import ModelConfig
from receptance.model import Model

_VOCABULARY = 64
_HEAD_WIDTH = 8


class RWKV(nn.Module):
    """RWKV-4 whose matrices, some of which begin at zero, are drawn."""

    def __init__(self, width: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        config = ModelConfig(vocab_size=_VOCABULARY, width=width, num_layers=layers)
        self.model = Model(config)
        self.emb = self.model.emb
        for layer in self.layers():
            for name in config.architecture.matrices:
                matrix = layer.get_parameter(f"{name}.weight")
                nn.init.normal_(matrix, 0, matrix.shape[1] ** -0.5, generator=generator)

    def layers(self) -> Sequence[nn.Module]:
        """The blocks, from the input on."""
        return list(self.model.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T] -> logits at the last position [B,V]."""
        return self.model(tokens)[0][:, -1]


class LSTM(nn.Module):
    """torch's LSTM, as many layers of it."""

    def __init__(self, width: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(_VOCABULARY, width), nn.Linear(width, _VOCABULARY)
        self.stack = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))

    def layers(self) -> Sequence[nn.Module]:
        """The layers, from the input on."""
        return list(self.stack)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T] -> logits at the last position [B,V]."""
        x = self.emb(tokens)
        for layer in self.stack:
            x = layer(x)[0]
        return self.head(x[:, -1])


class Transformer(nn.Module):
    """torch's Transformer, causal and with its layer norms first, without marks of positions."""

    def __init__(self, width: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(_VOCABULARY, width), nn.Linear(width, _VOCABULARY)
        self.norm = nn.LayerNorm(width)
        self.stack = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // _HEAD_WIDTH, 4 * width, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )

    def layers(self) -> Sequence[nn.Module]:
        """The layers, from the input on."""
        return list(self.stack)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T] -> logits at the last position [B,V]."""
        x = self.emb(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for layer in self.stack:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x[:, -1]))


NETWORKS: dict[str, Callable[[int, int, torch.Generator], RWKV | LSTM | Transformer]] = {
    "RWKV": RWKV,
    "LSTM": LSTM,
    "Transformer": Transformer,
}
"""The networks by name, made of a width, a number of layers and a generator."""


def network(name: str, width: int, layers: int, seed: int) -> RWKV | LSTM | Transformer:
    """A new network; what torch draws for it is decided by the seed as well."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return NETWORKS[name](width, layers, torch.Generator().manual_seed(seed))


def backward(
    name: str, width: int, layers: int, shape: tuple[int, int], seed: int
) -> dict[str, Any]:
    """Norms of the gradient of the loss at the last position, on random tokens of shape [B,T].

    whole, first: of the weights of all layers, and of the first. back: at the input some distances
    before the last, as shares of that at the last one.
    """
    net = network(name, width, layers, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(_VOCABULARY, (shape[0], shape[1] + 1), generator=generator)
    inputs: list[Tensor] = []
    net.emb.register_forward_hook(lambda module, given, out: inputs.append(out))
    logits = net(tokens[:, :-1])
    inputs[0].retain_grad()
    F.cross_entropy(logits, tokens[:, -1]).backward()
    stack = net.layers()
    assert inputs[0].grad is not None
    at = inputs[0].grad.norm(dim=(0, 2)).flip(0)
    distances = [d for d in (2**n for n in range(shape[1].bit_length())) if d < shape[1]]
    return {
        "whole": _norm(x for layer in stack for x in layer.parameters()),
        "first": _norm(stack[0].parameters()),
        "distances": distances,
        "back": [float(at[d] / at[0]) for d in distances],
    }


def parameters(name: str, width: int, layers: int) -> int:
    """All parameters of a network."""
    with torch.device("meta"):
        return sum(x.numel() for x in NETWORKS[name](width, layers, torch.Generator()).parameters())


def _norm(parameters: Any) -> float:
    grads = [x.grad.norm() for x in parameters if x.grad is not None]
    return float(torch.stack(grads).norm())
