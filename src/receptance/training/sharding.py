"""A model over several processes: copies (DDP), or a share of every tensor in each (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.model.parts import Linear
from receptance.training.objective import Objective
from receptance.training.options import TrainOptions
from receptance.training.ranks import Ranks

Parallel = Literal["none", "ddp", "fsdp"]


def build(
    config: ModelConfig,
    values: Iterable[tuple[str, Tensor]],
    options: TrainOptions,
    *,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
    parallel: Parallel = "ddp",
    offload: bool = False,
) -> Objective:
    """A model in training with the given parameter values, as what the processes share it by.

    Nothing is allocated before it is known which part of it belongs here, and values are taken
    one by one: a process holds its share and one tensor. offload keeps FSDP's shares in host
    memory. Returns the objective, wrapped; `whole_model` finds the model in it.
    """
    ranks = ranks or Ranks()
    device = torch.device(device)
    with torch.device("meta"):
        model = Model(config, dropout=options.dropout)
    model.recompute = options.recompute
    objective: nn.Module = Objective(model, options)
    sharded = parallel == "fsdp" and ranks.count > 1
    if offload and not sharded:
        raise ValueError(
            'offload keeps the shares of parallel="fsdp" in the host\'s memory, and there are no '
            "shares here; start several processes with torchrun, or leave offload out"
        )
    if sharded:
        _shard(objective, model, options, device, offload)
    model.to_empty(device="cpu" if sharded and offload else device)
    fill(model, values)
    if options.compile:
        for block in model.blocks:
            block.compile()
    if parallel == "ddp" and ranks.count > 1 and ranks.time_count == 1:
        devices = None if device.type == "cpu" else [device]
        objective = DistributedDataParallel(
            objective, device_ids=devices, gradient_as_bucket_view=True
        )
    return objective  # type: ignore[return-value]  # its wrappers are called the same way


def _shard(
    objective: nn.Module, model: Model, options: TrainOptions, device: torch.device, offload: bool
) -> None:
    """Shard each block in two groups, so that matrices travel in the activations' type.

    Vectors travel in float32, because bfloat16 would round a slow decay. On a CPU matrices do so
    as well: there the float32 masters are the better operands.
    """
    if offload and device.type == "cpu":
        raise ValueError("offload moves shards from a GPU to the host; leave it out on a CPU")
    narrow = options.dtype == "bfloat16" and device.type != "cpu"
    dtypes = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if narrow else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    common = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in model.blocks:
        matrices = [module for module in block.modules() if isinstance(module, Linear)]
        fully_shard(matrices, mp_policy=dtypes, **common)  # type: ignore[call-overload]
        fully_shard(block, **common)  # type: ignore[call-overload]
    fully_shard(objective, **common)  # type: ignore[call-overload]


def whole_model(objective: nn.Module) -> Model:
    """The model inside what `build` returned."""
    inner = objective.module if isinstance(objective, DistributedDataParallel) else objective
    model = inner.model
    assert isinstance(model, Model)
    return model


@torch.no_grad()
def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Put values into the parameters of the same names; a sharded parameter takes its share."""
    for name, value in values:
        assign(model.get_parameter(name), value)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or this process's share of it, into a parameter.

    ValueError unless their shapes are the same but for axes of size 1, which official files have
    more of: a transposed matrix has as many values and is another matrix.
    """
    if [n for n in value.shape if n != 1] != [n for n in target.shape if n != 1]:
        raise ValueError(
            f"a tensor of shape {list(value.shape)} does not fit a parameter of shape "
            f"{list(target.shape)}; give the weights of a model of the same sizes"
        )
    value = value.reshape(target.shape)
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        value = value.to(target.to_local().device, target.dtype)
        local = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
        target.to_local().copy_(local)
    else:
        target.copy_(value)


def working_device(parameter: Tensor) -> torch.device:
    """The device on which a parameter is used; with offload it is kept on another one."""
    if isinstance(parameter, DTensor):
        return torch.device(parameter.device_mesh.device_type)
    return parameter.device


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
