"""The engine for a CPU: C++ kernels (receptance/native) for packed weights of every type.

Activations and state are float32. A row's result is the same to the bit in any batch, with any
cut, any padding and any number of threads, because each sum has one fixed order.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from receptance.config import ModelConfig
from receptance.engine.base import EvaluationOnly, NotCopied
from receptance.engine.memory import Arena, room
from receptance.model.inputs import check_features, check_inputs
from receptance.model.rwkv import FINAL_EPSILON
from receptance.ops import native
from receptance.ops.threads import usable_threads
from receptance.quantize.packing import FLOATS, KINDS, FloatKind, Packed, pack
from receptance.state import State

# The kernels want the length of vectors to be a multiple of this: kBlock in product.h.
_BLOCK = 128
# The kernels read this many positions per pass; more would take memory and gain no speed.
POSITIONS = 512

# A thread is worth waking for this many multiplications, about ten microseconds of work.
_PRODUCTS_PER_THREAD = 1 << 18


class NativeEngine(NotCopied, EvaluationOnly):
    """A model whose matrices are packed, all in one type or in several (an `Engine`).

    The kernels read the tensors where they are. With `copy_at_pass`, meant for tensors of a mapped
    file, the matrices are copied to huge pages just before the pass of that number, counted from 1.
    `initial` is the state, of one row, in which rows begin; None means the empty state. `threads`
    None asks torch for its number at every call, and takes at most the CPUs that this process may
    use. Calls from several threads wait for each other, because all use the same buffers.
    """

    batch_invariant = True

    def __init__(
        self,
        config: ModelConfig,
        matrices: Mapping[str, Packed],
        vectors: Mapping[str, Tensor],
        fingerprint: str,
        *,
        initial: State | None = None,
        threads: int | None = None,
        instruction_set: str = "",
        copy_at_pass: int | None = None,
    ) -> None:
        check_supported(config)
        self.config, self.threads = config, threads
        self._fingerprint = fingerprint
        self._fields = config.architecture.state_fields
        self._initial = initial or _empty_state(config)
        self.packed = dict(matrices) if copy_at_pass is None else {}
        """The matrices by their official names, unless they are to move from a file to memory."""
        self._matrices = _all_matrices(config, matrices, vectors)
        self._vectors = list(_padded_vectors(config, vectors))
        self._instruction_set = instruction_set
        self._kernels = self._make_kernels()
        self._passes, self._copy_at_pass = 0, copy_at_pass
        self._block_numbers = sum(m.outputs * m.inputs for m in self._matrices[2:])
        self._inputs = self._nonzero = 0
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """The CPU, always."""
        return torch.device("cpu")

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights."""
        return sum(m.nbytes for m in self._matrices) + sum(v.nbytes for v in self._vectors)

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that one token of one row reads: all but the embedding.

        Fewer are read where the kernels skip the weights of activations that are zero.
        """
        return self.weight_bytes - self._matrices[0].nbytes

    @property
    def skipped(self) -> float:
        """The share of channel mixing's hidden values that were zero, whose weights are skipped."""
        return 1 - self._nonzero / self._inputs if self._inputs else 0.0

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The function from features to logits: [...,C] -> [...,V] float32."""
        return self._head

    def fingerprint(self) -> str:
        """The fingerprint of the model before its weights were packed or quantized."""
        return self._fingerprint

    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Features for the head, [B,T] -> [B,T,C] float32, and the next state (see Model)."""
        check_inputs(self.config, tokens, state, lengths, resets)
        if elsewhere := [x for x in (tokens, lengths, resets) if x is not None and not x.is_cpu]:
            raise ValueError(
                f"arguments are on {elsewhere[0].device}; the native kernels want them on the CPU"
            )
        batch, time = tokens.shape
        state = self._initial.rows([0] * batch) if state is None else state
        parts = [state.tensors[name].float().contiguous() for name in self._fields]
        step = max(1, POSITIONS // max(batch, 1))
        if lengths is None and resets is None and time <= step:
            starts, ids = _equal_rows(batch, time), tokens.flatten().long().contiguous()
            packed, parts = self._pass(parts, starts, ids, None)
            features = packed.view(batch, time, self.config.width)
            return features, State(self._named(parts), state.tokens + time)
        read = torch.full((batch,), time) if lengths is None else lengths.long()
        features = torch.zeros(batch, time, self.config.width)
        for start in range(0, time, step):
            piece = slice(start, min(start + step, time))
            inside = (read - start).clamp(0, piece.stop - start)
            real = torch.arange(piece.stop - start) < inside[:, None]
            ids = tokens[:, piece][real].long()
            flags = None if resets is None else resets[:, piece][real]
            starts = F.pad(inside.cumsum(0), (1, 0))
            features[:, piece][real], parts = self._pass(parts, starts, ids, flags)
        return features, State(self._named(parts), state.tokens + read)

    def _pass(
        self, before: list[Tensor], starts: Tensor, ids: Tensor, resets: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Call the kernels for up to POSITIONS positions: features and the state's next parts.

        The tokens of row b are ids[starts[b]:starts[b + 1]].
        """
        count = ids.shape[0]
        features = torch.empty(count, self.config.width)
        after = [torch.empty_like(x) for x in before]
        used = [starts, ids, resets, *before, *after, features]
        with self._lock:
            self._passes += 1
            if self._passes == self._copy_at_pass:
                self._copy_to_huge_pages()
            self._nonzero += self._kernels.features(
                starts.shape[0] - 1,
                count,
                [0 if x is None else x.data_ptr() for x in used],
                self._num_threads(count * self._block_numbers),
            )
            self._inputs += count * self.config.num_layers * self.config.ffn_width
        return features, after

    def _head(self, features: Tensor) -> Tensor:
        width, vocabulary = self.config.width, self.config.vocab_size
        check_features(features, width, self.device)
        features = features.float().contiguous()
        logits = torch.empty(*features.shape[:-1], vocabulary)
        if count := features.numel() // width:
            pointers = features.data_ptr(), logits.data_ptr()
            with self._lock:
                self._kernels.head(count, *pointers, self._num_threads(count * width * vocabulary))
        return logits

    def _named(self, parts: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._fields, parts, strict=True))

    def _copy_to_huge_pages(self) -> None:
        sizes = ((m.kind, m.layout, m.outputs, m.inputs, m.group) for m in self._matrices)
        arena = Arena(sum(room(*size) for size in sizes))
        self._matrices = [arena.hold_packed(m) for m in self._matrices]
        self._kernels = self._make_kernels()

    def _make_kernels(self) -> Any:
        """Make the C++ object that holds the addresses of this engine's tensors."""
        parts = self._vectors, self._matrices, self._instruction_set
        return _kernels(self.config, *parts)

    def _num_threads(self, products: int) -> int:
        """The number of threads for a pass, so that each has enough work to be worth waking."""
        most = self.threads or usable_threads()
        return max(1, min(most, products // _PRODUCTS_PER_THREAD))


@functools.lru_cache(maxsize=64)
def _equal_rows(batch: int, time: int) -> Tensor:
    """The start of each of B rows of equal length, and the end of the last: [B + 1]."""
    return torch.arange(batch + 1) * time


def supports(config: ModelConfig) -> bool:
    """Whether this package has kernels for this version of RWKV, whether or not they were built."""
    return config.architecture.native_kernel is not None


def check_supported(config: ModelConfig) -> None:
    """ValueError if there are no kernels for this version of RWKV."""
    if not supports(config):
        raise ValueError(
            f'the native kernels do not run RWKV-{config.version}; pass backend="torch"'
        )


def _all_matrices(
    config: ModelConfig, matrices: Mapping[str, Packed], vectors: Mapping[str, Tensor]
) -> list[Packed]:
    """All matrices in the order of the kernels: embedding, head, and those of each block.

    Factors of low rank become floats of the type that the block's matrices have, or float16 where
    those are integers.
    """
    version = config.architecture
    found = [matrices["emb.weight"], matrices["head.weight"]]
    for layer in range(config.num_layers):
        block = [matrices[f"blocks.{layer}.{name}.weight"] for name in version.matrices]
        dtype = FLOATS.get(cast(FloatKind, block[0].kind), torch.float16)
        factors = (vectors[f"blocks.{layer}.{name}"] for name in version.native_factors)
        each = (x for factor in factors for x in factor.view(-1, *factor.shape[-2:]))
        found += [*block, *(pack(x.detach().to(dtype).T, "tiles") for x in each)]
    return found


def _empty_state(config: ModelConfig) -> State:
    tensors = config.architecture.empty_state(config, 1, torch.empty(0))
    return State(tensors, torch.zeros(1, dtype=torch.int64))


def _padded_vectors(config: ModelConfig, vectors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """All vectors in the order of the kernels, padded with zeros; decays enter as logarithms."""
    version = config.architecture
    for name in ("blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias"):
        yield _padded(vectors[name])
    norms = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
    for layer in range(config.num_layers):
        for name in (f"blocks.{layer}.{own}" for own in (*norms, *version.native_vectors)):
            vector = vectors[name].float()
            yield _padded(version.log_decay(vector) if version.is_static_decay(name) else vector)


def _padded(vector: Tensor) -> Tensor:
    vector = vector.float().flatten()
    return F.pad(vector, (0, -len(vector) % _BLOCK)).contiguous()


def _kernels(
    config: ModelConfig, vectors: list[Tensor], matrices: list[Packed], instruction_set: str
) -> Any:
    """Make the C++ object. It holds only addresses, so the caller must keep the tensors alive."""
    library = native.library()
    if library is None:
        raise ValueError(
            "the native kernels were not built; `receptance doctor` says what is missing"
        )
    fields = [
        (
            KINDS.index(m.kind),
            m.outputs,
            m.inputs,
            m.group,
            m.data.data_ptr(),
            0 if m.params is None else m.params.data_ptr(),
        )
        for m in matrices
    ]
    return getattr(library, str(config.architecture.native_kernel))(
        config.width,
        config.ffn_width,
        config.vocab_size,
        config.layer_norm_epsilon,
        FINAL_EPSILON,
        [config.extras[name] for name in config.architecture.native_extras],
        [v.data_ptr() for v in vectors],
        fields,
        instruction_set,
    )
