"""A model on a GPU: decoding by CUDA graphs over Triton kernels, whole passes by large products.

Activations and state are float32; products are summed in it. Rows agree with their solo run to
float rounding of the weights' type, not to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.engine.base import NotCopied, OneCall
from receptance.engine.gpu_step import Buffers, multiply, step
from receptance.engine.gpu_weights import Matrix, gpu_weights, torch_model
from receptance.model.inputs import check_features, check_inputs
from receptance.model.rwkv import fingerprint
from receptance.ops.triton_products import Tiles
from receptance.ops.triton_wkv4 import check_launcher
from receptance.quantize import quantize
from receptance.quantize.packing import FLOATS, Kind, common_kind
from receptance.state import State

# Rows of the largest graph; more of them are read like a text.
LARGEST_BATCH = 1024
# Positions in one pass over a text. Memory grows with it: some 100 KB each at a width of 2048.
POSITIONS = 8192

Run = Callable[[], None]


def cuda_graph(run: Run) -> Run:
    """What replays a recording of run; run is called twice, and the first call may compile."""
    # Of the current device: what torch would capture on by itself belongs to the first one used.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on to allocate memory meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _unrecorded(run: Run) -> Run:
    """Triton's interpreter has nothing to record."""
    return run


class GpuEngine(NotCopied, OneCall):
    """A model whose weights lie on a GPU (an `Engine`).

    `initial`, of one row, is where rows begin if not empty. `capture` makes a recording of a step
    (None: `cuda_graph`), one for each of 1, 2, 4, ... rows when a batch first needs it. `tiles`
    cut the products. ValueError if Triton cannot launch anything here. Calls must not overlap: an
    engine has one memory to work in. On another device Triton's interpreter is wanted
    (TRITON_INTERPRET=1 when it is imported): for tests.
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
                f"the GPU kernels do not run RWKV-{config.version}; choose the backend torch"
            )
        # With its number, whatever the current one is later.
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
        """Memory of all weights."""
        vectors = sum(x.nbytes for x in self._model.parameters())
        return vectors + sum(x.nbytes for x in self._weights.matrices())

    @property
    def bytes_per_token(self) -> int:
        """What a step reads of them, whatever the rows: all but the embedding."""
        return self.weight_bytes - self._weights.embedding.nbytes

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Logits of features: [...,C] -> [...,V] float32."""
        return self._head

    def fingerprint(self) -> str:
        """That of the model whose weights these are, before they were packed or quantized."""
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
        """What goes into the head, [B,T] -> [B,T,C] float32, and the state (see Model.features).

        A token id that is out of range gives its row NaN: looking for one would stop the device.
        """
        check_inputs(self.config, tokens, state, lengths, resets)
        batch, time = tokens.shape
        state = self._fresh(batch) if state is None else state
        with self._on_device():
            if lengths is None and resets is None and time == 1 and 0 < batch <= LARGEST_BATCH:
                return self._step(tokens[:, 0], state)
            return self._read(tokens, state, lengths, resets)

    def _step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One position of every row, by the recording for as many rows or a few more."""
        batch = len(tokens)
        # Recorded before anything is copied in: recording runs the step.
        buffers, replay = self._graph(1 << (batch - 1).bit_length())
        parts = [state.tensors[name] for name in self.config.architecture.state_fields]
        buffers.tokens[:batch].copy_(tokens)
        if (joined := _joined(parts)) is not None:
            buffers.state[:, :, :batch].copy_(joined)
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

    def _fresh(self, batch: int) -> State:
        """Rows that have read nothing, without asking the device for an index (State.rows)."""
        tensors = {n: x.expand(-1, batch, *x.shape[2:]) for n, x in self._initial.tensors.items()}
        return State(tensors, self._initial.tokens.expand(batch))

    def _empty_state(self) -> State:
        like = torch.empty(0, device=self.device)
        tensors = self.config.architecture.empty_state(self.config, 1, like)
        return State(tensors, torch.zeros(1, dtype=torch.int64, device=self.device))

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Where Triton launches: on the current device, whatever the tensors."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Parts [L,B,C] as the one tensor that `_step` made them of, if it did: one copy, not five."""
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
    """An engine of a model's tensors under official names, in any float type.

    kind None is the one that all matrices have, else float32. tensors is emptied on the way.
    """
    whose = own_fingerprint or fingerprint(config, tensors)
    kind = kind or common_kind(tensors[name] for name in config.architecture.layouts(config))
    if kind in FLOATS and group is not None:
        raise ValueError(f"group is {group}; {kind} weights have none, so leave it out")
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
        whose,
        device=device,
        initial=initial,
        tiles=tiles,
        capture=capture,
    )
