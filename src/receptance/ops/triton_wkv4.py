"""WKV-4 on GPUs: which of the Triton kernels run a shape, and how they are launched.

Triton compiles them when they are first used; importing this module does not import it. Three
variants, chosen by shape alone: `step` for one token, `serial` for short sequences and for rows
and channels enough to fill a GPU, and `chunked`, parallel over time, for the rest: summarise every
chunk, scan the few summaries, replay every chunk.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
# Tokens whose loads are under way together, and between the states that the way back keeps.
GROUP = 8
# Up to this length one kernel that walks is done before three have been launched.
SERIAL_TIME = 128
# With so many rows times channels every multiprocessor has work without cutting time.
SERIAL_LANES = 65536
VARIANTS = ("step", "serial", "chunked")

# (BLOCK, warps) that the kernels with a lane per chunk are tuned over: 2, 2, 4 and 1 channels to a
# thread. Lanes are independent and go through the same operations whatever the choice, so that it
# changes no bit.
_CONFIGURATIONS = ((64, 1), (128, 2), (128, 1), (128, 4))
# With 4 channels to a thread this one wants more registers than there are.
_SPILLING = ("reverse", (128, 1))
# For the others: as many programs as there can be, until there are enough.
_NARROW, _WIDE = (32, 1), (128, 4)
# In Triton's interpreter programs cost more than lanes.
_INTERPRETED = 65536

Masks = tuple[Tensor | None, Tensor | None]
Options = dict[str, Any]

_INSTALLED = importlib.util.find_spec("triton") is not None


def is_available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def check_launcher() -> None:
    """ValueError if Triton cannot build here what launches its kernels; nothing after it has."""
    runtime = importlib.import_module("triton.runtime")
    try:
        _ = runtime.driver.active
    except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError) as error:
        failed = isinstance(error, subprocess.CalledProcessError)
        reason = "the C compiler failed" if failed else str(error).partition("\n")[0]
        raise ValueError(
            f"Triton cannot build what launches its kernels: {reason}. It wants gcc and Python's "
            "headers (apt install gcc python3-dev); without them choose another backend"
        ) from error


def choose_variant(batch: int, time: int, width: int) -> str:
    """The variant that runs a shape: a name from VARIANTS."""
    if time == 1:
        return "step"
    if time <= SERIAL_TIME or batch * width >= SERIAL_LANES:
        return "serial"
    return "chunked"


def forward(
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    exponent: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    variant: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B,T,C], the final state's three parts [B,C], chunk starts [B,N,3,C]."""
    batch, time, width = key.shape
    chunks = -(-time // CHUNK)
    state = _contiguous(numerator, denominator, exponent)
    starts = exponent.new_empty(batch, chunks, 3, width)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    if key.numel() == 0:
        a, b, o = (x.clone() for x in state)
        return out, a, b, o, starts
    variant = variant or choose_variant(batch, time, width)
    serial = variant != "chunked"
    tokens, masks = _contiguous(log_decay, bonus, key, value), _masks(resets, lengths)
    constants = _constants(time, lengths, 1 if variant == "step" else GROUP, serial)
    if not serial:
        _scan_chunks(tokens, masks, state, starts, constants)
    a, b, o = (torch.empty_like(x) for x in state)
    arguments = (*tokens, *state, *masks, starts, out, a, b, o, time, chunks)
    parts = batch if serial else batch * chunks
    _launch("replay", starts, parts, arguments, tuned=not serial, **constants, SERIAL=serial)
    return out, a, b, o, starts


def backward(
    grad_out: Tensor,
    grad_numerator: Tensor,
    grad_denominator: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    variant: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_decay, bonus, key, value, numerator, denominator (shapes as those)."""
    batch, time, width = key.shape
    ga, gb = _contiguous(grad_numerator, grad_denominator)
    tokens = _contiguous(log_decay, bonus, key, value, grad_out)
    grad_key, grad_value = (torch.empty_like(x) for x in tokens[2:4])
    if key.numel() == 0:
        zero = torch.zeros_like(tokens[0])
        return zero, zero.clone(), grad_key, grad_value, ga.clone(), gb.clone()
    serial = (variant or choose_variant(batch, time, width)) != "chunked"
    starts, chunks = starts.contiguous(), starts.shape[1]
    inputs = [*tokens, *_masks(resets, lengths), starts]
    constants = _constants(time, lengths, GROUP, serial)
    first_a, first_b = torch.empty_like(ga), torch.empty_like(gb)
    if serial:
        marks = starts.new_empty(batch, CHUNK // GROUP, 4, width)
        ends = torch.stack([ga, gb], dim=1)
    else:
        marks, ends = _scan_chunks_back(inputs, (ga, gb), (first_a, first_b), constants)
    vectors = starts.new_empty(batch, chunks, 2, width)
    results = (first_a, first_b, vectors, grad_key, grad_value)
    arguments = (*inputs, marks, ends, *results, time, chunks)
    parts = batch if serial else batch * chunks
    _launch("reverse", starts, parts, arguments, tuned=not serial, **constants, SERIAL=serial)
    # Sums in a fixed order: without atomics the same call gives the same bits.
    grad_decay, grad_bonus = vectors.sum((0, 1), dtype=torch.float64).to(starts.dtype)
    return grad_decay.clone(), grad_bonus.clone(), grad_key, grad_value, first_a, first_b


def _scan_chunks(
    tokens: list[Tensor], masks: Masks, state: list[Tensor], starts: Tensor, options: Options
) -> None:
    """Fill in the state before every chunk."""
    log_decay, _, key, value = tokens
    batch, chunks, _, width = starts.shape
    summaries = starts.new_empty(batch, chunks, 4, width)
    arguments = (log_decay, key, value, *masks, summaries, key.shape[1], chunks)
    _launch("summarise", starts, batch * chunks, arguments, tuned=True, **options)
    scanned = (log_decay, *state, summaries, starts, chunks)
    _launch("scan", starts, batch, scanned, tuned=False, GROUP=GROUP)


def _scan_chunks_back(
    inputs: list[Any], after: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """The states at groups and the gradients after chunks; fills in those before the first."""
    key, starts = inputs[2], inputs[-1]
    batch, chunks, _, width = starts.shape
    marks = starts.new_empty(batch, chunks, CHUNK // GROUP, 4, width)
    links = starts.new_empty(batch, chunks, 4, width)
    arguments = (*inputs, marks, links, key.shape[1], chunks)
    _launch("sweep", starts, batch * chunks, arguments, tuned=True, **options)
    ends = starts.new_empty(batch, chunks, 2, width)
    scanned = (links, *after, ends, *before, chunks)
    _launch("scan_back", starts, batch, scanned, tuned=False, GROUP=GROUP)
    return marks, ends


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


def _masks(resets: Tensor | None, lengths: Tensor | None) -> Masks:
    resets = None if resets is None else resets.contiguous().view(torch.uint8)
    return resets, None if lengths is None else lengths.long().contiguous()


def _constants(time: int, lengths: Tensor | None, group: int, serial: bool) -> Options:
    """What the kernels that go through tokens are compiled for, the width aside."""
    whole = group if serial or time < CHUNK else CHUNK
    full = lengths is None and time % whole == 0
    return {"CHUNK": CHUNK, "GROUP": group, "FULL": full}


def _launch(
    name: str,
    like: Tensor,
    parts: int,
    arguments: tuple[Any, ...],
    *,
    tuned: bool,
    **constants: Any,
) -> None:
    """Run a kernel on the device of `like` [...,C], with a lane for each part and channel."""
    kernel, interpreted = _kernel(name, tuned)
    width, lanes = like.shape[-1], parts * like.shape[-1]
    constants |= _blocks(lanes, tuned, interpreted) | {"C": width}

    def grid(chosen: Options) -> tuple[int]:
        return (-(-lanes // int(chosen["BLOCK"])),)

    with torch.cuda.device_of(like):
        kernel[grid](*arguments, parts, **constants)


def _blocks(lanes: int, tuned: bool, interpreted: bool) -> Options:
    """How the lanes are spread over programs, as far as no tuning says so, and how it is built."""
    if interpreted:
        return {"BLOCK": min(_INTERPRETED, 1 << (lanes - 1).bit_length())}
    # Whether a release of Triton fuses multiplications with additions must not decide the bits.
    options: Options = {"enable_fp_fusion": True}
    block, warps = _WIDE if lanes >= SERIAL_LANES else _NARROW
    return options if tuned else options | {"BLOCK": block, "num_warps": warps}


@functools.cache
def _kernel(name: str, tuned: bool) -> tuple[Any, bool]:
    """A kernel ready to be launched, and whether numpy runs it, under TRITON_INTERPRET=1."""
    triton = importlib.import_module("triton")
    kernel = getattr(importlib.import_module("receptance.ops.triton_wkv4_kernels"), name)
    if not isinstance(kernel, triton.JITFunction):
        return kernel, True
    check_launcher()
    if tuned:
        choices = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in configurations(name)]
        kernel = triton.autotune(choices, key=["C"])(kernel)
    return kernel, False


def configurations(name: str) -> list[tuple[int, int]]:
    """Lanes of a program and its warps: what a kernel with a lane per chunk is tuned over."""
    return [choice for choice in _CONFIGURATIONS if (name, choice) != _SPILLING]
