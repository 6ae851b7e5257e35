"""A model's weights as the Triton kernels read them, and a torch model that shares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.model.rwkv import FINAL_EPSILON
from receptance.ops.triton_steps import Norm
from receptance.ops.triton_weights import Weights, dequantize
from receptance.quantize import Quantized
from receptance.quantize.packing import FLOATS, Packed, unpack

Matrix = Tensor | Quantized | Packed


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """The weights of one block; its vectors are float32."""

    ln1: Norm
    att_shares: Tensor
    """[3,C], the token-shift shares of key, value and receptance."""
    projections: Weights
    """The matrices of key, value and receptance in time mixing."""
    log_decay: Tensor
    bonus: Tensor
    output: Weights
    ln2: Norm
    ffn_shares: Tensor
    """[2,C], the token-shift shares of key and receptance."""
    channel: Weights
    """The matrices of key and receptance in channel mixing."""
    value: Weights


@dataclass(frozen=True, eq=False)
class GpuWeights:
    """The weights of a whole model."""

    embedding: Weights
    ln0: Norm
    layers: list[GpuLayer]
    ln_out: Norm
    head: Weights

    def matrices(self) -> Iterator[Weights]:
        """All matrices, the embedding first."""
        yield self.embedding
        for layer in self.layers:
            yield from (layer.projections, layer.output, layer.channel, layer.value)
        yield self.head


def gpu_weights(
    config: ModelConfig,
    matrices: Mapping[str, Matrix],
    vectors: Mapping[str, Tensor],
    device: torch.device,
) -> GpuWeights:
    """Copy a model, given by official names, to the device, repacking one matrix at a time."""

    def stack(*names: str) -> Weights:
        return stacked([matrices[f"{name}.weight"] for name in names], device)

    def vector(name: str) -> Tensor:
        return vectors[name].detach().to(device, torch.float32).flatten().contiguous()

    def norm(name: str, epsilon: float = config.layer_norm_epsilon) -> Norm:
        return vector(f"{name}.weight"), vector(f"{name}.bias"), epsilon

    version = config.architecture
    names = version.gpu_kernels
    assert names is not None

    def layer(i: int) -> GpuLayer:
        def vectors_of(field: str) -> Tensor:
            return torch.stack([vector(f"blocks.{i}.{name}") for name in names[field]])

        def matrices_of(field: str) -> Weights:
            return stack(*(f"blocks.{i}.{name}" for name in names[field]))

        return GpuLayer(
            ln1=norm(f"blocks.{i}.ln1"),
            att_shares=vectors_of("att_shares"),
            projections=matrices_of("projections"),
            log_decay=version.log_decay(vectors_of("log_decay")[0]),
            bonus=vectors_of("bonus")[0],
            output=matrices_of("output"),
            ln2=norm(f"blocks.{i}.ln2"),
            ffn_shares=vectors_of("ffn_shares"),
            channel=matrices_of("channel"),
            value=matrices_of("value"),
        )

    return GpuWeights(
        embedding=stack("emb"),
        ln0=norm("blocks.0.ln0"),
        layers=[layer(i) for i in range(config.num_layers)],
        ln_out=norm("ln_out", FINAL_EPSILON),
        head=stack("head"),
    )


def stacked(parts: list[Matrix], device: torch.device) -> Weights:
    """Stack matrices of one kind and input size; all but the first have the same output size."""
    plain = [unpack(x) if isinstance(x, Packed) else x for x in parts]
    first, rest = plain[0].shape[0], plain[1].shape[0] if len(plain) > 1 else 0
    sizes = first, rest, plain[0].shape[1]
    if all(isinstance(x, Tensor) for x in plain):
        data = torch.cat([x.detach().to(device) for x in plain])  # type: ignore[union-attr]
        kind = next(kind for kind, dtype in FLOATS.items() if dtype == data.dtype)
        return Weights(kind, 0, *sizes, data, data, data)
    codes = [x for x in plain if isinstance(x, Quantized)]
    assert len(codes) == len(plain)
    data = torch.cat([_in_groups(x).to(device) for x in codes])
    scale = torch.cat([x.scale.to(device) for x in codes])
    least = [x.minimum.to(device) for x in codes if x.minimum is not None]
    minimum = torch.cat(least) if least else scale
    return Weights(codes[0].kind, codes[0].group, *sizes, data, scale, minimum)


def _in_groups(x: Quantized) -> Tensor:
    """Pad codes to whole groups: [N,K] -> [N,K'], or [N,K'/2] for int4.

    A byte of int4 holds a code of the first and of the second half of its group.
    """
    codes = F.pad(x.codes, (0, -x.codes.shape[1] % x.group))
    if x.kind == "int8":
        return codes
    halves = codes.unflatten(1, (-1, 2, x.group // 2))
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


# ---- the torch model ----------------------------------------------------------------------------


def times(weights: Weights, rows: slice, x: Tensor) -> Tensor:
    """Multiply many rows by the chosen outputs of a matrix: [P,K] float32 -> [P,N'] float32.

    The factors are rounded to the type of the weights; integer weights are dequantized to bfloat16.
    """
    dtype = FLOATS.get(weights.kind, torch.bfloat16)  # type: ignore[call-overload]
    matrix = dequantize(weights, rows, dtype)
    if dtype != torch.float16:
        return F.linear(x.to(dtype), matrix).float()
    # The square of a relu can exceed the range of float16, so each row is scaled down to at most 1.
    largest = x.abs().amax(-1, keepdim=True).clamp_(min=1)
    return F.linear((x / largest).to(dtype), matrix).float().mul_(largest)


class _Product(nn.Module):
    """A module that stands in for a `Linear` and computes some outputs of a stacked matrix."""

    def __init__(self, weights: Weights, rows: slice) -> None:
        super().__init__()
        self._weights, self._rows = weights, rows

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N'] float32."""
        return times(self._weights, self._rows, x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class _Rows(nn.Module):
    """A module that stands in for the embedding and dequantizes the rows it looks up."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [...,C] float32.

        An id out of range gives NaN; torch's own look-up would fail an assertion on the device,
        which ends the process.
        """
        weights = self._weights
        known = (tokens >= 0) & (tokens < weights.outputs)
        ids = tokens.where(known, 0).flatten()
        data = weights.data[ids]
        coded = weights.kind not in FLOATS
        params = [x[ids] if coded else data for x in weights.arguments()[1:]]
        picked = Weights(weights.kind, weights.group, len(ids), 0, weights.inputs, data, *params)
        rows = dequantize(picked, slice(None), torch.float32).unflatten(0, tokens.shape)
        return rows.where(known[..., None], torch.nan)


def torch_model(
    config: ModelConfig, weights: GpuWeights, vectors: Mapping[str, Tensor], device: torch.device
) -> Model:
    """A `Model` with these weights for prefill: it computes in float32, except for its products."""
    with torch.device("meta"):
        model = Model(config).eval().requires_grad_(False)
    float32 = {name: x.detach().to(device, torch.float32) for name, x in vectors.items()}
    shaped = {name: float32[name].view_as(model.get_parameter(name)) for name in float32}
    model.load_state_dict(shaped, strict=False, assign=True)
    for name, module in _modules(config, weights):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
    return model


def _modules(config: ModelConfig, weights: GpuWeights) -> Iterator[tuple[str, nn.Module]]:
    yield "emb", _Rows(weights.embedding)
    yield "head", _Product(weights.head, slice(None))
    names, shapes = config.architecture.gpu_kernels, config.architecture.shapes(config)
    assert names is not None
    for i, layer in enumerate(weights.layers):
        for field in ("projections", "output", "channel", "value"):
            start = 0
            for name in (f"blocks.{i}.{own}" for own in names[field]):
                stop = start + shapes[f"{name}.weight"][0]
                yield name, _Product(getattr(layer, field), slice(start, stop))
                start = stop
