"""How fast this machine reads memory, and how fast a model runs on it.

Every token needs every matrix but the embedding. At batch 1, reading them is what limits decoding:
the memory limit is (bytes a second) / (bytes of weights a token).
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.engine.base import Engine
from receptance.engine.memory import allocate
from receptance.formats.names import tensor_shapes
from receptance.inference.generation import prefill
from receptance.model import Model
from receptance.ops import native
from receptance.ops.threads import usable_threads
from receptance.tokenizer import Tokenizer

# More than any cache holds.
_BANDWIDTH_BYTES = 1 << 29
_STEPS = 8  # decoding steps between two looks at the clock
_LEAST_REPEATS = 3


def read_bandwidth(threads: int | None = None) -> tuple[float, str]:
    """Bytes per second at which threads (None: those usable) read memory, and what measured it."""
    threads = threads or usable_threads()
    library = native.library()
    data = allocate(_BANDWIDTH_BYTES).fill_(1).view(torch.int64)
    if library is not None:
        speed = library.read_bandwidth(data.data_ptr(), data.nbytes, threads)
        return speed * 1e9, "native kernel"
    best = min(seconds(data.sum) for _ in range(7))
    return data.nbytes / best, "torch.sum of int64"


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def weight_bytes(engine: Engine) -> int:
    """Memory of an engine's weights."""
    if isinstance(engine, Model):
        return sum(x.nbytes for x in engine.parameters())
    return int(engine.weight_bytes)  # type: ignore[attr-defined]


def bytes_per_token(engine: Engine) -> int:
    """Bytes of weights that a step at batch 1 reads: all but the embedding."""
    if isinstance(engine, Model):
        return weight_bytes(engine) - engine.emb.weight.nbytes
    return int(engine.bytes_per_token)  # type: ignore[attr-defined]


def decode_speed(engine: Engine, batch: int = 1, at_least: float = 1.0) -> float:
    """Tokens per second of all rows together, greedy, a median over `at_least` seconds or more."""
    advance = decoder(engine, batch)
    return batch * _STEPS / _median_seconds(lambda: advance(_STEPS), at_least)


def decoder(engine: Engine, batch: int = 1) -> Callable[[int], None]:
    """A function that generates so many tokens in every row, going on where it stopped."""
    logits, state = engine(_ids(engine, batch)[:, None])

    @torch.no_grad()
    def advance(steps: int) -> None:
        nonlocal logits, state
        for _ in range(steps):
            logits, state = engine(logits[:, -1].argmax(-1, keepdim=True), state)

    advance(2 * _STEPS)  # weights of a mapped file are in memory of their own by then
    return advance


def prefill_speed(engine: Engine, length: int, at_least: float = 1.0) -> float:
    """Tokens per second of reading one prompt of that length, and scoring what follows it."""
    prompt = _ids(engine, length).tolist()
    return length / _median_seconds(lambda: prefill(engine, [prompt]), at_least)


def first_token(engine: Engine, prompt: int = 16) -> float:
    """Seconds until the token after a prompt of that length, called once, on a new engine."""
    ids = _ids(engine, prompt).tolist()
    return seconds(lambda: prefill(engine, [ids])[0].argmax(-1).item())


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM, where the system tells (Linux)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, object]:
    """The hardware and the libraries that a figure belongs to."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    sets = native.instruction_sets()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": name,
        "instructions": sets[0] if sets else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# ---- a model of any size without training -------------------------------------------------------


class NumberedTokens(Tokenizer):
    """A vocabulary of the wanted size that stands for nothing: what random weights need."""

    kind = "numbered"

    def __init__(self, vocab_size: int) -> None:
        super().__init__([b"%d " % number for number in range(vocab_size)], b"%d" % vocab_size)

    def encode(self, text: str | bytes) -> list[int]:
        """Numbers with spaces between them."""
        return [int(number) for number in text.split()]

    def save(self, directory: Path) -> list[str]:
        """Nothing to write: the size is that of the model."""
        return []


def random_tensors(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights that keep activations in their usual ranges, none of them zero, by official name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random(name, shape, generator).to(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 2:
        return noise.div_(math.sqrt(shape[-1]))
    line = torch.linspace(0, 1, shape[-1]).expand(shape)
    # The ranges of v4.TimeMix.initialize.
    if name.endswith("time_decay"):
        return 8 * line - 5 + 0.1 * noise
    if "time_mix" in name:
        return (line + 0.01 * noise).clamp(0.01, 1)
    center = {"time_first": math.log(0.3), "weight": 1.0, "bias": 0.0}[name.rpartition(".")[2]]
    return center + 0.1 * noise


def _ids(engine: Engine, count: int) -> Tensor:
    """Token ids that do not follow each other in the embedding: [count]."""
    return torch.arange(1, count + 1, device=engine.device) * 7919 % engine.config.vocab_size


def _median_seconds(run: Callable[[], object], at_least: float) -> float:
    run()
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or sum(times) < at_least:
        times.append(seconds(run))
    return statistics.median(times)
