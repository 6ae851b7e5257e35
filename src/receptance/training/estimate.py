"""An estimate of a run's cost before it begins: parameters, FLOPs, memory per rank, time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from receptance.config import ModelConfig
from receptance.training.devices import THIS_MACHINE, Device, find_device
from receptance.training.objective import logits_at_once
from receptance.training.options import TrainOptions

# RWKV-LM's README reports 106,000 tokens/s for 1.5B with context 1024 on 8 A100 of 312 TFLOP/s
# each, which is this share. Its 14B run (114,000 tokens/s on 64 A100, recomputing) reached 0.476.
DEFAULT_UTILIZATION = 0.36

_SECONDS_PER_DAY = 86_400
_FLOAT32 = 4
# FSDP gathers a block while it computes the one before.
_GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class Memory:
    """The bytes that one process holds, by purpose."""

    parameters: float
    """The masters of the parameters, in float32."""
    gradients: float
    """Their gradients, in float32."""
    moments: float
    """Adam's two averages, in float32."""
    weights: float
    """Copies of matrices in the type of activations, and copies gathered from other ranks."""
    activations: float
    """The tensors that the forward pass of one piece (micro_batch rows of chunk tokens) keeps for
    its backward pass; with recompute, the inputs of all blocks and everything of one block."""
    head: float
    """The logits of some positions with their gradients, and the gradients of the head's matrix and
    of its inputs, before they are added to those of earlier pieces."""

    @property
    def total(self) -> float:
        """The sum, as if all purposes peaked together; CUDA itself takes about 1 GB more."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """The cost of a run on `ranks` devices of one kind."""

    config: ModelConfig
    options: TrainOptions
    device: Device
    ranks: int
    positions: tuple[int, int]
    """The rows, and the tokens of each row, that a rank computes at a time."""
    utilization: float
    """The share of the device's peak that goes into the model (MFU); recomputation lowers it."""
    memory: Memory
    """The memory that each rank needs."""
    trained: int | None = None
    """The number of parameters of an adapter, if that alone is trained; None for the model."""

    @property
    def flops_per_token(self) -> int:
        """The FLOPs of a token, forward and backward.

        Beside an adapter the model's matrices have no gradients, which are a third of all FLOPs.
        """
        forward = self.config.forward_flops_per_token
        return self.config.training_flops_per_token if self.trained is None else 2 * forward

    @property
    def tokens_per_step(self) -> int:
        """The tokens that all ranks together read in a step."""
        return self.options.batch * self.options.context

    @property
    def steps(self) -> int:
        """The number of updates, if need be as many as the time limit allows."""
        steps = self.options.total_steps
        if self.options.minutes:
            limit = 60 * self.options.minutes * self.tokens_per_second / self.tokens_per_step
            steps = min(steps, math.ceil(limit))
        return steps

    @property
    def tokens(self) -> int:
        """The tokens that are read in all steps, repetitions in later epochs included."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """The FLOPs of all steps, forward and backward, in matrix products only."""
        return float(self.tokens * self.flops_per_token)

    @property
    def tokens_per_second(self) -> float:
        """The speed of all ranks together."""
        peak = self.ranks * self.device.flops
        return peak * self.utilization / self.flops_per_token

    @property
    def days(self) -> float:
        """The time of the steps; reports, checkpoints and waiting for data come on top."""
        return self.tokens / self.tokens_per_second / _SECONDS_PER_DAY

    @property
    def fits(self) -> bool:
        """Whether the memory of a rank is enough."""
        return self.memory.total <= self.device.memory


def estimate(
    config: ModelConfig,
    options: TrainOptions,
    *,
    ranks: int = 1,
    context_ranks: int = 1,
    sharded: bool = False,
    offload: bool = False,
    trained: int | None = None,
    device_name: str = THIS_MACHINE,
    utilization: float = DEFAULT_UTILIZATION,
) -> Estimate:
    """The cost of a run on `ranks` devices of one kind (see devices.DEVICES).

    context_ranks is how many of them share a row. sharded divides masters, gradients and moments
    over all (FSDP), and offload moves these to the host's memory, which is not counted. trained is
    the number of parameters of an adapter, if that is trained instead of the model. ValueError on
    an unknown device, and on ranks or a utilization that cannot be.
    """
    if context_ranks < 1 or ranks % context_ranks:
        raise ValueError(f"context_ranks is {context_ranks}; it must divide the {ranks} ranks")
    groups = ranks // context_ranks
    if not 1 <= groups <= options.batch:
        raise ValueError(
            f"ranks is {ranks}; it must be between 1 and the batch ({options.batch}), times "
            f"context_ranks ({context_ranks})"
        )
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is {utilization}; it must be over 0 and at most 1")
    rows, time = math.ceil(options.batch / groups), math.ceil(options.context / context_ranks)
    piece = min(options.micro_batch or rows, rows), min(options.chunk or time, time)
    on_cpu = device_name == THIS_MACHINE and not torch.cuda.is_available()
    found = memory(
        config,
        options,
        piece,
        shares=ranks if sharded else 1,
        trained=trained,
        logits=logits_at_once("cpu" if on_cpu else "cuda"),
    )
    if offload:
        found = replace(found, parameters=0, gradients=0, moments=0)
    device = find_device(device_name)
    return Estimate(config, options, device, ranks, piece, utilization, found, trained)


def memory(
    config: ModelConfig,
    options: TrainOptions,
    piece: tuple[int, int],
    *,
    shares: int = 1,
    trained: int | None = None,
    logits: int = logits_at_once("cpu"),
) -> Memory:
    """Bytes in a process that has one of `shares` and reads `piece` (rows, tokens) at a time.

    logits is how many of them exist at a time (see objective.logits_at_once).
    """
    every = _FLOAT32 * config.num_parameters / shares
    learning = _FLOAT32 * (config.num_trained / shares if trained is None else trained)
    positions = math.prod(piece)
    return Memory(
        parameters=every if trained is None else every + learning,
        gradients=learning,
        moments=2 * learning,
        weights=_weights(config, options, sharded=shares > 1),
        activations=_activations(config, options, positions),
        head=_head(config, options, positions, logits, learns=trained is None),
    )


def _activations(config: ModelConfig, options: TrainOptions, positions: int) -> float:
    element, layers = _element_bytes(options), config.num_layers
    block = config.architecture.kept_per_position(config, element, inputs=options.recompute)
    kept = element * config.width
    ends = 2 * element * config.width  # inputs of the first and of the last layer norm
    blocks = layers * kept + block if options.recompute else layers * block
    return positions * (blocks + ends)


def _weights(config: ModelConfig, options: TrainOptions, *, sharded: bool) -> float:
    """Layers cast their weights as they use them, and keep that for the backward pass.

    Under FSDP a cast is what travels, and lives as long as its block is in use.
    """
    shapes = config.architecture.block_shapes(config, config.num_layers - 1)
    block = sum(math.prod(shapes[f"{name}.weight"]) for name in config.architecture.matrices)
    element = _element_bytes(options)
    if sharded:
        ends = 2 * config.vocab_size * config.width
        return _FLOAT32 * ends + element * min(_GATHERED_BLOCKS, config.num_layers) * block
    if element == _FLOAT32:
        return 0
    return element * block * (1 if options.recompute else config.num_layers)


def _head(
    config: ModelConfig, options: TrainOptions, positions: int, logits: int, *, learns: bool
) -> float:
    element, matrix = _element_bytes(options), config.vocab_size * config.width
    logits = min(logits, positions * config.vocab_size)
    gradients = 2 * _FLOAT32 * matrix * learns + element * positions * config.width
    if element == _FLOAT32:
        return 2 * _FLOAT32 * logits + gradients
    # Narrow copies of the matrix and of the error, and a wide one of the error turned round.
    return (3 * _FLOAT32 + element) * logits + element * matrix + gradients


def _element_bytes(options: TrainOptions) -> int:
    return 2 if options.dtype == "bfloat16" else _FLOAT32


def table(found: Estimate) -> Table:
    """The estimate as a table for people, with a line per figure."""
    config, device, (rows, time) = found.config, found.device, found.positions
    lines = Table(box=None, show_header=False, pad_edge=False)
    sizes = f"{config.num_layers} layers of {config.width}, vocabulary {config.vocab_size:,}"
    lines.add_row("parameters", f"{config.num_parameters:,} ({sizes})")
    if found.trained is not None:
        lines.add_row("  trained", f"{found.trained:,}")
    per_token = found.flops_per_token
    lines.add_row("FLOPs", f"{found.flops:.3g} ({per_token:.4g} per token, forward and backward)")
    lines.add_row("steps", f"{found.steps:,} of {found.tokens_per_step:,} tokens")
    lines.add_row("tokens", f"{found.tokens:,}")
    of = "" if math.isinf(device.memory) else f" of {_size(device.memory)}"
    lines.add_row("memory per rank", f"{_size(found.memory.total)}{of}")
    for name, size in asdict(found.memory).items():
        note = f"  ({rows} × {time:,} tokens)" if name == "activations" else ""
        lines.add_row(f"  {name}", f"{_size(size)}{note}")
    lines.add_row("time", f"{_duration(found.days)} on {found.ranks} × {device.name}")
    share = f"{found.tokens_per_second:,.0f} tokens/s, {found.utilization:.0%} of"
    lines.add_row("", f"at {share} {device.flops / 1e12:,.3g} TFLOP/s each")
    return lines


def show(console: Console, found: Estimate) -> None:
    """Print the table, and advice if the memory of a rank is not enough."""
    console.print(table(found))
    if not found.fits:
        console.print(
            f"this does not fit into the {_size(found.device.memory)} of {found.device.name}: take "
            "a smaller micro_batch or chunk, recompute, or FSDP over more ranks",
            style="bold red",
        )


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    hours = 24 * days
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
