"""The engine for a GPU: CUDA graphs of Triton kernels decode, large matrix products prefill.

Activations, state and the sums of products are float32. A row of a batch agrees with the same row
run alone up to rounding in the weights' type, not to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.engine.base import EvaluationOnly, NotCopied
from receptance.engine.gpu_step import Buffers, multiply, step
from receptance.engine.gpu_weights import Matrix, gpu_weights, torch_model
from receptance.model.inputs import check_features, check_inputs
from receptance.model.rwkv import fingerprint
from receptance.ops.triton_launching import check_launcher
from receptance.ops.triton_products import Tiles
from receptance.quantize import quantize
from receptance.quantize.packing import FLOATS, Kind, common_kind
from receptance.state import State

# The largest batch that has a CUDA graph; larger ones are run as a prefill of one position.
LARGEST_BATCH = 1024
# A prefill reads this many positions per pass. At a width of 2048 each one takes about 100 KB.
POSITIONS = 8192

Run = Callable[[], None]


def cuda_graph(run: Run) -> Run:
    """Record `run` and return a function that replays it.

    `run` is called twice: the first call may compile kernels, the second one is recorded.
    """
    # Without a stream of its own torch would capture on one of the first device that was used,
    # which need not be the current device.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate memory during the capture.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _unrecorded(run: Run) -> Run:
    """Return run itself: Triton's interpreter has nothing to record."""
    return run


class GpuEngine(NotCopied, EvaluationOnly):
    """A model whose weights lie on a GPU (an `Engine`).

    `initial` is the state, of one row, in which rows begin; None means the empty state. `capture`
    records a step (None: `cuda_graph`); the engine records one step for each batch of 1, 2, 4, ...
    rows when it first needs it. `tiles` are the tile sizes of the matrix products. Calls must not
    overlap, because all of them use the same buffers. On a device other than a GPU, as in tests,
    Triton must have been imported with TRITON_INTERPRET=1. ValueError if Triton cannot launch a
    kernel.
    """

    batch_invariant = False

    def __init__(
        self,
        config: ModelConfig,
        matrices: Mapping[str, Matrix],
        vectors: Mapping[str, Tensor],
        fingerprint: str,
        *,
        device: torch.device | str = "cuda",
        initial: State | None = None,
        tiles: Tiles | None = None,
        capture: Callable[[Run], Run] | None = None,
    ) -> None:
        if config.architecture.gpu_kernels is None:
            raise ValueError(
                f'the GPU kernels do not run RWKV-{config.version}; pass backend="torch"'
            )
        # The device of a tensor has a number: "cuda" alone would follow the current device.
        self.config, self.device = config, torch.empty(0, device=device).device
        self._fingerprint, self._tiles = fingerprint, tiles or Tiles()
        self._capture = capture or (cuda_graph if self.device.type == "cuda" else _unrecorded)
        with self._on_device():
            if self.device.type == "cuda":
                check_launcher()
            self._weights = gpu_weights(config, matrices, vectors, self.device)
        self._model = torch_model(config, self._weights, vectors, self.device)
        self._initial = self._empty_state() if initial is None else initial.to(self.device)
        self._graphs: dict[int, tuple[Buffers, Run]] = {}

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights."""
        vectors = sum(x.nbytes for x in self._model.parameters())
        return vectors + sum(x.nbytes for x in self._weights.matrices())

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that a step reads for any number of rows: all but the embedding."""
        return self.weight_bytes - self._weights.embedding.nbytes

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The function from features to logits: [...,C] -> [...,V] float32."""
        return self._head

    def fingerprint(self) -> str:
        """The fingerprint of the model before its weights were packed or quantized."""
        return self._fingerprint

    @torch.no_grad()
    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Features for the head, [B,T] -> [B,T,C] float32, and the next state (see Model.features).

        A token id that is out of range makes its row NaN: checking the ids would synchronize with
        the device.
        """
        check_inputs(self.config, tokens, state, lengths, resets)
        batch, time = tokens.shape
        state = self._initial_rows(batch) if state is None else state
        with self._on_device():
            if lengths is None and resets is None and time == 1 and 0 < batch <= LARGEST_BATCH:
                return self._step(tokens[:, 0], state)
            return self._read(tokens, state, lengths, resets)

    def _step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token per row by a graph for the next power of two of rows: [B] -> [B,1,C]."""
        batch = len(tokens)
        # Recording a graph runs the step, so the buffers are filled only after it.
        buffers, replay = self._graph(1 << (batch - 1).bit_length())
        parts = [state.tensors[name] for name in self.config.architecture.state_fields]
        buffers.tokens[:batch].copy_(tokens)
        if (whole := _as_one_tensor(parts)) is not None:
            buffers.state[:, :, :batch].copy_(whole)
        else:
            for place, part in zip(buffers.state, parts, strict=True):
                place[:, :batch].copy_(part)
        replay()
        after = buffers.state[:, :, :batch].clone().unbind(0)
        named = dict(zip(self.config.architecture.state_fields, after, strict=True))
        return buffers.features[:batch, None].clone(), State(named, state.tokens + 1)

    def _graph(self, rows: int) -> tuple[Buffers, Run]:
        if rows not in self._graphs:
            buffers = Buffers(self.config, rows, self.device)
            replay = self._capture(lambda: step(self._weights, buffers, self._tiles))
            self._graphs[rows] = buffers, replay
        return self._graphs[rows]

    def _read(
        self, tokens: Tensor, state: State, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, State]:
        batch, time = tokens.shape
        features = torch.zeros(batch, time, self.config.width, device=self.device)
        positions = max(1, POSITIONS // max(batch, 1))
        for start in range(0, time, positions):
            piece = slice(start, min(start + positions, time))
            features[:, piece], state = self._model.features(
                tokens[:, piece],
                state,
                lengths=None if lengths is None else (lengths - start).clamp(0, piece.stop - start),
                resets=None if resets is None else resets[:, piece],
                dtype=torch.float32,
            )
        return features, state

    @torch.no_grad()
    def _head(self, features: Tensor) -> Tensor:
        check_features(features, self.config.width, self.device)
        rows = features.float().reshape(-1, self.config.width).contiguous()
        logits = torch.empty(len(rows), self.config.vocab_size, device=self.device)
        if len(rows):
            with self._on_device():
                multiply(self._weights.head, rows[None], logits, tiles=self._tiles)
        return logits.view(*features.shape[:-1], self.config.vocab_size)

    def _initial_rows(self, batch: int) -> State:
        """The initial state of `batch` rows, without an index on the device as State.rows needs."""
        tensors = {n: x.expand(-1, batch, *x.shape[2:]) for n, x in self._initial.tensors.items()}
        return State(tensors, self._initial.tokens.expand(batch))

    def _empty_state(self) -> State:
        like = torch.empty(0, device=self.device)
        tensors = self.config.architecture.empty_state(self.config, 1, like)
        return State(tensors, torch.zeros(1, dtype=torch.int64, device=self.device))

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make this device the current one: Triton launches there, wherever the tensors are."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()


def _as_one_tensor(parts: list[Tensor]) -> Tensor | None:
    """The single tensor that holds all parts one after another: [L,B,C] each -> [parts,L,B,C].

    None if they lie apart in memory. `_step` returns parts that do not lie apart, so that the next
    step needs one copy instead of five.
    """
    first, size = parts[0], parts[0].numel()
    for i, part in enumerate(parts):
        apart = part.data_ptr() - first.data_ptr() != i * size * first.element_size()
        if apart or part.dtype != first.dtype or not part.is_contiguous():
            return None
    if first.untyped_storage().data_ptr() != parts[-1].untyped_storage().data_ptr():
        return None
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()))


def gpu_engine(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    kind: Kind | None = None,
    *,
    group: int | None = None,
    device: torch.device | str = "cuda",
    initial: State | None = None,
    own_fingerprint: str | None = None,
    tiles: Tiles | None = None,
    capture: Callable[[Run], Run] | None = None,
) -> GpuEngine:
    """Make an engine of a model's tensors under official names, in any float type.

    With kind None the matrices keep their type if all have the same one, otherwise they become
    float32. The dict `tensors` is emptied on the way.
    """
    states_of = own_fingerprint or fingerprint(config, tensors)
    kind = kind or common_kind(tensors[name] for name in config.architecture.layouts(config))
    if kind in FLOATS and group is not None:
        raise ValueError(f"group is {group}; {kind} weights have none, so leave out group=")
    matrices: dict[str, Matrix] = {}
    for name in config.architecture.layouts(config):
        weight = tensors.pop(name).detach()
        if kind == "int8" or kind == "int4":
            matrices[name] = quantize(weight, kind, group)
        else:
            matrices[name] = weight.to(FLOATS[kind])
    return GpuEngine(
        config,
        matrices,
        tensors,
        states_of,
        device=device,
        initial=initial,
        tiles=tiles,
        capture=capture,
    )
