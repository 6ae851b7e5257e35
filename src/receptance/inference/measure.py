"""How fast this machine reads memory, and how fast a model runs on it.

Every token needs every matrix but the embedding. At batch 1 decoding is limited by reading them:
the most tokens per second are (bytes read per second) / (bytes of weights per token).
"""

from __future__ import annotations

import math
import os
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
from receptance.ops import native
from receptance.ops.threads import usable_threads
from receptance.tokenizer import Tokenizer

# No processor's cache holds so many bytes.
_BANDWIDTH_BYTES = 1 << 29
_STEPS = 8  # the number of decoding steps between two looks at the clock
_LEAST_REPEATS = 3


def read_bandwidth(threads: int | None = None) -> tuple[float, str]:
    """Bytes per second that the threads (None: those usable) read, and the method's name."""
    threads = threads or usable_threads()
    library = native.library()
    data = allocate(_BANDWIDTH_BYTES).fill_(1).view(torch.int64)
    if library is not None:
        speed = library.read_bandwidth(data.data_ptr(), data.nbytes, threads)
        return speed * 1e9, "native kernel"
    best = min(seconds(data.sum) for _ in range(7))
    return data.nbytes / best, "torch.sum of int64"


def seconds(run: Callable[[], object]) -> float:
    """The wall time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def decode_speed(engine: Engine, batch: int = 1, at_least: float = 1.0) -> float:
    """Tokens per second of greedy decoding, of all rows together.

    The figure is the median of measurements that take `at_least` seconds in all.
    """
    advance = decoder(engine, batch)
    return batch * _STEPS / _median_seconds(lambda: advance(_STEPS), at_least)


def decoder(engine: Engine, batch: int = 1) -> Callable[[int], None]:
    """A function that generates a number of tokens in every row, going on where it stopped."""
    tokens, state = _ids(engine, batch)[:, None], None

    @torch.no_grad()
    def advance(steps: int) -> None:
        nonlocal tokens, state
        with engine.evaluating():
            for _ in range(steps):
                logits, state = engine(tokens, state)
                tokens = logits[:, -1].argmax(-1, keepdim=True)

    advance(2 * _STEPS + 1)  # an engine copies the weights of a mapped file within so many calls
    return advance


def prefill_speed(engine: Engine, length: int, at_least: float = 1.0) -> float:
    """Tokens per second of reading a prompt of a length up to the logits of the next token."""
    prompt = _ids(engine, length).tolist()
    return length / _median_seconds(lambda: prefill(engine, [prompt]), at_least)


def first_token(engine: Engine, length: int = 16) -> float:
    """Seconds until the token after a prompt of a length; to be called once, on a new engine."""
    ids = _ids(engine, length).tolist()
    return seconds(lambda: prefill(engine, [ids])[0].argmax(-1).item())


def resident_bytes() -> int | None:
    """The bytes of this process that are in RAM; None where the system is not Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, object]:
    """The hardware and the libraries that were used for a figure."""
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
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# ---- a model of any size without training -------------------------------------------------------


class NumberedTokens(Tokenizer):
    """A vocabulary of any size for random weights: the text of every token is its number."""

    kind = "numbered"

    def __init__(self, vocab_size: int) -> None:
        super().__init__([b"%d " % number for number in range(vocab_size)], b"%d" % vocab_size)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids that a text of numbers with spaces between them names."""
        return [int(number) for number in text.split()]

    def save(self, directory: Path) -> list[str]:
        """Write no file, because the size of the vocabulary is that of the model."""
        return []


def random_tensors(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random weights by official name: none is zero, and activations keep their usual ranges."""
    generator, matrices = torch.Generator().manual_seed(seed), config.architecture.layouts(config)
    return {
        name: (
            torch.randn(shape, generator=generator).div_(math.sqrt(shape[-1]))
            if name in matrices
            else config.architecture.example_vector(name, shape, generator)
        ).to(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def _ids(engine: Engine, count: int) -> Tensor:
    """Token ids [count] that are far apart in the embedding, as those of a text are."""
    return torch.arange(1, count + 1, device=engine.device) * 7919 % engine.config.vocab_size


def _median_seconds(run: Callable[[], object], at_least: float) -> float:
    run()
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or sum(times) < at_least:
        times.append(seconds(run))
    return statistics.median(times)
