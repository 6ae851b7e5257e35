"""`Architecture`, the interface between a version of RWKV and the rest of the package.

A version is one module beside this one, v4.py for example. It holds the version's mathematics,
`TimeMix` and `ChannelMix`, and an `Architecture` that answers every question about it: which
parameters there are, what its state holds, how kernels want its weights. No other module knows
these.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]

Layout = Literal["tiles", "rows", "embedding"]
"""The order in which kernels want a matrix in memory (see quantize.packing)."""


class Place(NamedTuple):
    """Where a tensor can be seen in a block: it is an argument, or a result, of a call there."""

    call: str
    """A module of the block or a method of one, such as "att.output"."""
    side: Literal["argument", "result"] = "result"
    number: int = 0
    """The number of the argument, or of the result if there are several."""


class Sizes(Protocol):
    """The fields of a ModelConfig that a version reads."""

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        ...

    @property
    def width(self) -> int:
        """C, the number of channels."""
        ...

    @property
    def num_layers(self) -> int:
        """L, the number of blocks."""
        ...

    @property
    def ffn_width(self) -> int:
        """F, the hidden width of channel mixing."""
        ...

    @property
    def layer_norm_epsilon(self) -> float:
        """The epsilon of the layer norms in the blocks."""
        ...

    @property
    def extras(self) -> Mapping[str, float]:
        """The sizes and epsilons that only this version has, by name."""
        ...


class Architecture(ABC):
    """A version of RWKV: an embedding, blocks of time mixing and channel mixing, a head.

    Names of parameters within a block are relative to it: "att.key.weight" is
    "blocks.3.att.key.weight" in block 3. A version overrides what it has; the defaults here mean
    that it has none.
    """

    number: ClassVar[float]
    """The number of the version, as in `ModelConfig.version`."""
    time_mix: ClassVar[type[Any]]
    """The class of time mixing, which replaces attention; it is made as time_mix(sizes, layer).

    The module takes (x [B,T,C], layer state, Reading, *handed) and returns (out [B,T,C], layer
    state, *handed). The next block gets the tensors handed on: none in most versions, the value of
    the first layer in RWKV-7.

    For receptance.analysis it has a method `wkv`, which calls the operator and returns its output
    first, and a method `sources`, which takes the same arguments and `positions` [P], and returns
    the ops.Sources that the output at these positions is made of.
    """
    channel_mix: ClassVar[type[Any]]
    """The class of the feed-forward network; it is made as channel_mix(sizes, layer).

    The module takes (x [B,T,C], layer state, Reading) and returns (out [B,T,C], layer state).
    """
    layer_state: ClassVar[type[Any]]
    """The NamedTuple of the tensors in one layer's state, each [B,...]; see `empty_layer`."""
    operator: ClassVar[str | None] = None
    """The name of the recurrence in receptance.ops, whose backends the model can be told to use."""
    matrices: ClassVar[Mapping[str, Layout]]
    """The matrices of a block that are packed and quantized, and the layout of each."""
    residual_outputs: ClassVar[tuple[str, ...]]
    """The matrices of a block whose products are added to the residual stream."""
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    """The parameters of a block that are never narrower than float32."""
    static_decay: ClassVar[str | None] = None
    """The parameter of a block that alone sets the decay of its channels, if there is one."""
    intermediates: ClassVar[Mapping[str, Place]] = {}
    """The tensors [B,T,...] inside time mixing and channel mixing that analysis can read and
    write, by their names in the block. Its sums, norms and states need no entry."""
    decay_center: ClassVar[str | None] = None
    """The parameter of a block around which the decay of its channels varies, if it does."""
    time_state: ClassVar[str | None] = None
    """The only tensor of `learnable_state`, [L,...], if the official files of learned states have
    it layer by layer."""
    native_kernel: ClassVar[str | None] = None
    """The name of the class in the native library that runs this version, if there is one."""
    native_extras: ClassVar[tuple[str, ...]] = ()
    """The extras that the native class takes besides the sizes of every model, in its order."""
    native_vectors: ClassVar[tuple[str, ...]] = ()
    """The vectors of a block that the native class reads after those of its norms, in its order."""
    native_factors: ClassVar[tuple[str, ...]] = ()
    """The matrices [in,out] of a block that the native class reads as floats whatever the type of
    the others, in its order: factors of low rank, which are small and sensitive to rounding. A
    tensor of three axes holds several."""
    gpu_kernels: ClassVar[Mapping[str, tuple[str, ...]] | None] = None
    """The parameters in each field of engine.gpu_weights.GpuLayer; None without such kernels."""

    # ---- parameters ----------------------------------------------------------------------------

    @abstractmethod
    def block_shapes(self, sizes: Sizes, layer: int) -> dict[str, Shape]:
        """The shape of every parameter of a block's `att` and `ffn`, by its name in the block."""

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """The shape of every tensor of a model, by official name."""
        vocab_size, width = sizes.vocab_size, sizes.width
        found: dict[str, Shape] = {"emb.weight": (vocab_size, width)}
        for norm in ("blocks.0.ln0", "ln_out"):
            found |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        found["head.weight"] = (vocab_size, width)
        norms: dict[str, Shape] = {f"{n}.{part}": (width,) for n in _NORMS for part in _NORM_PARTS}
        for layer in range(sizes.num_layers):
            block = norms | self.block_shapes(sizes, layer)
            found |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
        return found

    def layouts(self, sizes: Sizes) -> dict[str, Layout]:
        """The layout of every matrix that is packed and quantized, by official name."""
        found: dict[str, Layout] = {"emb.weight": "embedding", "head.weight": "tiles"}
        for layer in range(sizes.num_layers):
            for name, layout in self.matrices.items():
                found[f"blocks.{layer}.{name}.weight"] = layout
        return found

    def is_float32(self, name: str) -> bool:
        """Whether the parameter of this official name is never narrower than float32."""
        return name.endswith(self.float32_parameters) if self.float32_parameters else False

    def is_static_decay(self, name: str) -> bool:
        """Whether this is the official name of a parameter that `log_decay` takes."""
        return self.static_decay is not None and name.endswith(f".{self.static_decay}")

    def is_decay(self, name: str) -> bool:
        """Whether a parameter sets a decay, or the center of one; `log_decay` takes both."""
        center = self.decay_center
        return self.is_static_decay(name) or (center is not None and name.endswith(f".{center}"))

    def unused(self, sizes: Sizes) -> tuple[str, ...]:
        """The official names of tensors that files hold and no model uses or trains."""
        return ()

    def log_decay(self, parameter: Tensor) -> Tensor:
        """The logarithm of the decay per token, never positive, of a parameter of `is_decay`."""
        raise NotImplementedError(f"RWKV-{self.number} has no parameter of a decay")

    def is_weight_decayed(self, name: str, shape: torch.Size | Shape) -> bool:
        """Whether weight decay acts on a parameter, as it does on matrices."""
        return sum(size > 1 for size in shape) >= 2

    # ---- sizes ---------------------------------------------------------------------------------

    def default_extras(self, width: int) -> Mapping[str, float]:
        """The sizes and epsilons that only this version has, with their usual values.

        A size is an int and an epsilon a float, of which a configuration may have others.
        """
        return {}

    def default_ffn_width(self, width: int) -> int:
        """F of a model whose configuration leaves it out."""
        return 4 * width

    def check(self, sizes: Sizes) -> None:  # noqa: B027 Most versions have nothing to check.
        """ValueError for sizes that this version cannot have."""

    def infer(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The fields of the ModelConfig whose tensors, by official name, have these shapes."""
        vocab_size, width = _matrix(shapes, "emb.weight", "(vocabulary, width)")
        ffn_width, _ = _matrix(shapes, "blocks.0.ffn.key.weight", "(feed-forward width, width)")
        # The layers are counted: the largest index in a damaged file could be 10**12.
        layers = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        return {
            "version": self.number,
            "vocab_size": vocab_size,
            "width": width,
            "num_layers": layers,
            "ffn_width": ffn_width,
        }

    def num_parameters(self, sizes: Sizes) -> int:
        """The exact number of values in all tensors."""
        return sum(map(math.prod, self.shapes(sizes).values()))

    def forward_flops_per_token(self, sizes: Sizes) -> int:
        """Two operations per weight of a matrix, except for the embedding, which is looked up."""
        shapes = self.shapes(sizes)
        matrices = (
            math.prod(s) for name, s in shapes.items() if len(s) == 2 and name != _EMBEDDING
        )
        return 2 * sum(matrices)

    @abstractmethod
    def kept_per_position(self, sizes: Sizes, element_bytes: int, *, inputs: bool) -> float:
        """The bytes that a block saves per position for its backward pass.

        element_bytes is the size of one number of an activation. `inputs` tells whether the inputs
        of matrices are saved as well, instead of being recomputed in the backward pass.
        """

    # ---- state ---------------------------------------------------------------------------------

    @property
    def state_fields(self) -> tuple[str, ...]:
        """The names of a state's tensors, in order."""
        fields: tuple[str, ...] = self.layer_state._fields
        return fields

    @property
    def state_parts(self) -> Mapping[str, tuple[str, ...]]:
        """The parts of a state that mean something alone: the names of the fields in each."""
        return {name: (name,) for name in self.state_fields}

    def interpolate(self, one: Any, other: Any, share: float) -> Any:
        """The `layer_state` between two, which is `one` at share 0 and `other` at share 1."""
        parts = zip(one, other, strict=True)
        return self.layer_state(*(torch.lerp(x, y, share) for x, y in parts))

    @abstractmethod
    def state_shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """The sizes of the axes after [L,B], for each tensor of a state."""

    @abstractmethod
    def empty_layer(self, sizes: Sizes, batch: int, like: Tensor) -> Any:
        """The `layer_state` of rows that have read nothing, on the device of `like`.

        Its activations have the dtype of `like`, its other tensors float32 or wider.
        """

    def empty_state(self, sizes: Sizes, batch: int, like: Tensor) -> dict[str, Tensor]:
        """The tensors, by name, of a state that has read nothing: each [L,B,...]."""
        layer = self.empty_layer(sizes, batch, like)
        return {
            name: part.expand(sizes.num_layers, *part.shape)
            for name, part in zip(self.state_fields, layer, strict=True)
        }

    def learnable_state(self, sizes: Sizes, strength: float) -> dict[str, Tensor]:
        """The starting values that state tuning learns from, by name: each [L,...].

        strength is the logarithm of a learned key's weight relative to the keys of the text. Only
        versions that normalize their state by the sum of these weights use it.
        """
        like = torch.empty(0)
        return {n: x[:, 0].clone() for n, x in self.empty_state(sizes, 1, like).items()}

    def learned_state(self, learned: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Turn learned values into a state, in the dtypes of `empty_layer`: each tensor [L,...]."""
        return {name: x.to(like.dtype) for name, x in learned.items()}

    # ---- values for measurements ---------------------------------------------------------------

    def example_vector(self, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
        """Random values in the range of trained models, for a parameter that is not a matrix."""
        center = 1.0 if name.endswith("weight") else 0.0
        return center + 0.1 * torch.randn(shape, generator=generator)


_EMBEDDING = "emb.weight"
_NORMS = ("ln1", "ln2")
_NORM_PARTS = ("weight", "bias")


def _matrix(shapes: Mapping[str, Shape], name: str, wanted: str) -> tuple[int, int]:
    shape = shapes[name]
    if len(shape) != 2:
        raise ValueError(f"{name} has the shape {shape}; it must be {wanted}")
    return shape[0], shape[1]
