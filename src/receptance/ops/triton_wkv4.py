"""WKV-4 on GPUs: which variant of the Triton kernels runs a shape, and how they are launched.

Triton compiles them when they are first used; importing this module does not import it. Three
variants are chosen by shape alone: `step` for one token, `serial` for short sequences and where
rows and channels are enough to fill a GPU, and `chunked`, parallel over time, for everything else:
tile by tile it sums up the pieces of a tile, scans the few sums, and recomputes every piece.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from receptance.ops.arguments import BackwardInputs, Gradients, Inputs, Results
from receptance.ops.triton_launching import kernel_of

# The number of tokens between the states that forward keeps. In the backward pass they are the
# piece of a lane.
CHUNK = 16
# The pieces of a tile in the chunked variant, and the tokens of a piece in its forward pass. The
# other variants have one piece.
PIECES, GROUP = 8, 32
# Up to this length a serial loop is short, and a tile of the chunked variant would hardly be full.
SERIAL_TIME = 128
# With so many rows times channels every multiprocessor has work although time is not divided.
SERIAL_LANES = 65536
VARIANTS = ("step", "serial", "chunked")

# The chunked variant is tuned over these: BLOCK, warps, and the most registers of a thread. A
# thread has one lane, and a multiprocessor 8 to 16 warps. The choice changes no bit, because
# channels are independent and go through the same operations.
CONFIGURATIONS = {
    "forward": ((16, 4, 128), (32, 8, 128)),
    "backward": ((16, 4, 168), (16, 4, 255)),
}
# BLOCK and warps of the other variants: narrow programs, until there are enough of them.
_NARROW, _WIDE = (32, 1), (128, 4)
# The BLOCK in Triton's interpreter, where programs cost more than lanes.
_INTERPRETED = 8192
# The number of tokens that the careful way of the kernels loads together.
_SOME = 4

Options = dict[str, Any]


def choose_variant(batch: int, time: int, width: int) -> str:
    """The variant for a shape: a name from VARIANTS."""
    if time == 1:
        return "step"
    if time <= SERIAL_TIME or batch * width >= SERIAL_LANES:
        return "serial"
    return "chunked"


def kept_states(time: int) -> int:
    """How many states forward keeps: one before every chunk, and the last."""
    return -(-time // CHUNK) + 1


def forward(x: Inputs, variant: str = "") -> Results:
    """Output [B,T,C], the final state's three parts [B,C], kept states [B,N,3,C]."""
    batch, time, width = x.key.shape
    x = Inputs(**_readable(x))
    state = x.numerator, x.denominator, x.exponent
    starts = x.exponent.new_empty(batch, kept_states(time), 3, width)
    out = torch.empty_like(x.value)
    if x.key.numel() == 0:
        starts.zero_()
        a, b, o = (part.clone() for part in state)
        return out, a, b, o, starts
    variant = variant or choose_variant(batch, time, width)
    pieces, group = {"step": (1, 1), "serial": (1, CHUNK), "chunked": (PIECES, GROUP)}[variant]
    a, b, o = (torch.empty_like(part) for part in state)
    results = {"out": out, "numerator_out": a, "denominator_out": b, "exponent_out": o}
    arguments = x._asdict() | results | {"starts": starts, "sums": _sums(starts, pieces)}
    constants = {"PIECES": pieces, "GROUP": group, "SOME": min(_SOME, group), "CHUNK": CHUNK}
    _launch("forward", starts, time, arguments, constants)
    return out, a, b, o, starts


def backward(x: BackwardInputs, variant: str = "") -> Gradients:
    """Gradients of log_decay, bonus, key, value, numerator, denominator (shapes as those)."""
    batch, time, width = x.key.shape
    x = BackwardInputs(**_readable(x))
    after = x.grad_numerator, x.grad_denominator
    grad_key, grad_value = torch.empty_like(x.key), torch.empty_like(x.value)
    if x.key.numel() == 0:
        zero = torch.zeros_like(x.log_decay)
        return zero, zero.clone(), grad_key, grad_value, after[0].clone(), after[1].clone()
    variant = variant or choose_variant(batch, time, width)
    pieces = PIECES if variant == "chunked" else 1
    first_a, first_b = (torch.empty_like(part) for part in after)
    vectors = x.starts.new_empty(batch, pieces, 2, width)
    results = {"grad_vectors": vectors, "grad_key": grad_key, "grad_value": grad_value}
    results |= {"grad_numerator_in": first_a, "grad_denominator_in": first_b}
    arguments = x._asdict() | results | {"sums": _sums(x.starts, pieces)}
    constants = {"PIECES": pieces, "GROUP": CHUNK, "SOME": _SOME}
    _launch("backward", x.starts, time, arguments, constants)
    # The kernel uses no atomics and this sum has a fixed order: the same call gives the same bits.
    grad_decay, grad_bonus = vectors.sum((0, 1), dtype=torch.float64).to(x.starts.dtype)
    return grad_decay.clone(), grad_bonus.clone(), grad_key, grad_value, first_a, first_b


def _sums(starts: Tensor, pieces: int) -> Tensor:
    """Memory through which the lanes of a channel exchange sums: [B,PIECES,5,C]."""
    batch, _, _, width = starts.shape
    return starts.new_empty((batch, pieces, 5, width) if pieces > 1 else (0,))


def _readable(x: Inputs | BackwardInputs) -> dict[str, Any]:
    """The tensors as the kernels read them: contiguous, resets as bytes, lengths of 64 bits."""
    fields = {name: y.contiguous() for name, y in x._asdict().items() if y is not None}
    if x.resets is not None:
        fields["resets"] = fields["resets"].view(torch.uint8)
    if x.lengths is not None:
        fields["lengths"] = fields["lengths"].long()
    return fields


def _launch(
    name: str, starts: Tensor, time: int, arguments: Options, constants: dict[str, int]
) -> None:
    """Run a kernel on the device of starts [B,N,3,C], each program on some channels of a row."""
    batch, kept, _, width = starts.shape
    pieces, lanes = constants["PIECES"], batch * width
    kernel, interpreted = _kernel(name, tuned=pieces > 1)
    options = constants | _blocks(lanes, pieces, interpreted)
    options |= {"C": width, "ROUGH": not interpreted and starts.dtype == torch.float32}

    def grid(chosen: Options) -> tuple[int]:
        return (-(-lanes // int(chosen["BLOCK"])),)

    with torch.cuda.device_of(starts):
        kernel[grid](**arguments, T=time, N=kept, rows=batch, **options)


def _blocks(lanes: int, pieces: int, interpreted: bool) -> Options:
    """How channels are spread over programs, unless tuning decides that, and compiler options."""
    if interpreted:
        return {"BLOCK": min(_INTERPRETED, 1 << (lanes - 1).bit_length())}
    # Fusing multiplications with additions is set, so that no default of a release decides the
    # bits.
    options: Options = {"enable_fp_fusion": True}
    block, warps = _WIDE if lanes >= SERIAL_LANES else _NARROW
    return options if pieces > 1 else options | {"BLOCK": block, "num_warps": warps}


@functools.cache
def _kernel(name: str, *, tuned: bool) -> tuple[Any, bool]:
    """A kernel that can be launched, and whether it is interpreted."""
    kernel, interpreted = kernel_of(f"triton_wkv4_{name}", name)
    if tuned and not interpreted:
        triton = importlib.import_module("triton")
        choices = [
            triton.Config({"BLOCK": block}, num_warps=warps, maxnreg=registers)
            for block, warps, registers in CONFIGURATIONS[name]
        ]
        kernel = triton.autotune(choices, key=["C"])(kernel)
    return kernel, interpreted
