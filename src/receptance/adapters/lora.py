"""LoRA (arXiv 2106.09685): low-rank matrices that are trained beside a model's matrices.

y = W x + (alpha / r) B A x        A [r,in], B [out,r], W frozen
"""

from __future__ import annotations

import fnmatch
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from receptance.adapters.base import Adapter
from receptance.model import Model
from receptance.model.parts import Linear


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """The options of LoRA: low-rank matrices beside those of the blocks."""

    rank: int = 8
    """Rank r of each pair of matrices A and B."""
    alpha: float = 16.0
    """The product is scaled by alpha / rank, so that the learning rate need not follow the rank."""
    dropout: float = 0.0
    """Share of each pair's inputs that dropout zeroes in training."""
    targets: tuple[str, ...] = ("blocks.*.att.*", "blocks.*.ffn.*")
    """Patterns of the names of matrices, such as "blocks.*.att.*" or "blocks.0.*"."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}; it must be over 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")
        if not self.targets:
            raise ValueError("no targets; name at least one matrix, such as 'blocks.*.att.*'")


class LowRank(nn.Module):
    """x -> B A x, computed without the matrix B A; B starts as zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = Linear(inputs, rank), Linear(rank, outputs)
        bound = inputs**-0.5  # The authors' code, microsoft/LoRA, starts A so.
        nn.init.uniform_(self.down.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        return self.up(self.down(x))

    def product(self) -> Tensor:
        """The matrix B A: [out,in]."""
        return self.up.weight @ self.down.weight


class LoRA(Adapter):
    """A pair (A, B) for each matrix of the blocks that is a target; A is drawn from the seed."""

    kind: ClassVar[str] = "lora"

    def __init__(self, model: Model, options: LoRAOptions, *, seed: int = 0) -> None:
        super().__init__(options)
        self.scale, self.dropout = options.alpha / options.rank, options.dropout
        generator = torch.Generator().manual_seed(seed)
        self.names = _targets(model, options.targets)
        self.pairs = nn.ModuleList()
        for name in self.names:
            outputs, inputs = _matrix(model, name).weight.shape
            self.pairs.append(LowRank(inputs, outputs, options.rank, generator))
        self.to(model.emb.weight.device)

    def hooks(self, model: Model) -> list[RemovableHandle]:
        """Register a hook on each target that adds (alpha / r) B A x to its output."""
        return [
            _matrix(model, name).register_forward_hook(self._add(pair))
            for name, pair in self._all()
        ]

    def check_fits(self, model: Model) -> None:
        """ValueError names the first target that is missing or of another shape."""
        matrices = _matrices(model)
        for name, pair in self._all():
            wanted = (pair.up.weight.shape[0], pair.down.weight.shape[1])
            if name not in matrices or matrices[name].weight.shape != wanted:
                raise ValueError(f"the model has no matrix {name} of shape {list(wanted)}")

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by name: A [r,in] and B [out,r] of each target."""
        both = [
            (name + part, matrix.weight)
            for name, pair in self._all()
            for part, matrix in ((".lora_A", pair.down), (".lora_B", pair.up))
        ]
        return dict(both)

    def changed(self) -> set[str]:
        """The names of the targets' weights."""
        return {f"{name}.weight" for name in self.names}

    @torch.no_grad()
    def merge(self, model: Model, dtype: torch.dtype | None = None) -> Model:
        """Make a model with W + (alpha / r) B A in place of each W; the one given is not changed.

        dtype None keeps that of the model. The sum is computed in float32 or wider and then
        rounded, because a sum in bfloat16 would lose small changes.
        """
        self.check_fits(model)
        tensors = {name: x.detach().clone() for name, x in model.state_dict().items()}
        for name, pair in self._all():
            weight = tensors[f"{name}.weight"]
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            tensors[f"{name}.weight"] = wide + self.scale * pair.product().to(wide)
        device = model.emb.weight.device
        dtype = dtype or model.emb.weight.dtype
        return Model.from_tensors(model.config, tensors, device=device, dtype=dtype)

    def _all(self) -> Iterator[tuple[str, LowRank]]:
        return zip(self.names, cast(list[LowRank], list(self.pairs)), strict=True)

    def _add(self, pair: LowRank) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = F.dropout(inputs[0], self.dropout, self.training)
            return output + self.scale * pair(x)

        return add


def _matrices(model: Model) -> dict[str, Linear]:
    """The matrices of the blocks by name.

    The head is left out: training reads its weight and never calls the module, so that a hook on
    it would have no effect.
    """
    blocks = model.blocks.named_modules(prefix="blocks")
    return {name: module for name, module in blocks if isinstance(module, Linear)}


def _matrix(model: Model, name: str) -> Linear:
    return cast(Linear, model.get_submodule(name))


def _targets(model: Model, patterns: tuple[str, ...]) -> list[str]:
    names = list(_matrices(model))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            first = ", ".join(name for name in names if name.startswith("blocks.0."))
            raise ValueError(
                f"target {reprlib.repr(pattern)} fits no matrix of the blocks; those are {first} …"
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
