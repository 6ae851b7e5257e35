"""The model: embed -> blocks -> head, with one call for both forms.

`model(tokens)` over a whole text is the parallel form; `model(token, state)` for one token at a
time is the recurrent form. They are the same function: cutting a sequence anywhere, batching it
with anything, padding or packing it changes no result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from receptance.model.config import ModelConfig
from receptance.model.inputs import check_inputs
from receptance.model.modes import evaluating
from receptance.model.parts import LayerNorm, Linear, Reading
from receptance.state import State

# The official code leaves the last layer norm at the default epsilon of torch.
FINAL_EPSILON = 1e-5
_HEAD_SCALE = 0.5
_FINGERPRINT_SAMPLES = 4096


class Block(nn.Module):
    """x + time mixing, then x + channel mixing, each after its own layer norm.

    The first block also has a layer norm on the embedding.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        # This is a bool and not the layer's number: an int attribute that differs from block to
        # block makes torch.compile specialize on it and compile every block again.
        self.first = layer == 0
        if self.first:
            self.ln0 = LayerNorm(config.width, config.layer_norm_epsilon)
        self.ln1 = LayerNorm(config.width, config.layer_norm_epsilon)
        self.ln2 = LayerNorm(config.width, config.layer_norm_epsilon)
        self.att = config.architecture.time_mix(config, layer)
        self.ffn = config.architecture.channel_mix(config, layer)
        self._float32 = config.architecture.float32_parameters

    def forward(
        self, x: Tensor, state: Any, reading: Reading, dropout: float, *handed: Tensor
    ) -> tuple[Any, ...]:
        """[B,T,C] -> [B,T,C], the layer's next state, and the tensors handed to the next block."""
        if self.first:
            x = self.ln0(x)
        x, state, *handed_on = self.mix_time(x, state, reading, dropout, *handed)
        return *self.mix_channels(x, state, reading, dropout), *handed_on

    def mix_time(
        self, x: Tensor, state: Any, reading: Reading, dropout: float, *handed: Tensor
    ) -> tuple[Any, ...]:
        """The first sum, [B,T,C] -> [B,T,C], the layer's state, and the tensors handed on."""
        mixed, state, *handed_on = self.att(self.ln1(x), state, reading, *handed)
        return F.dropout(x + mixed, dropout, self.training), state, *handed_on

    def mix_channels(
        self, x: Tensor, state: Any, reading: Reading, dropout: float
    ) -> tuple[Tensor, Any]:
        """The second sum, [B,T,C] -> [B,T,C], and the layer's state."""
        mixed, state = self.ffn(self.ln2(x), state, reading)
        return F.dropout(x + mixed, dropout, self.training), state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        # torch calls this to cast or move a module. bfloat16 would round a decay of 0.999 to 1, and
        # the state would never forget; so some parameters move but are never cast below float32.
        kept = {name: self.get_parameter(name).detach() for name in self._float32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device, torch.float32)
        return self


def through(
    blocks: Sequence[Block],
    config: ModelConfig,
    x: Tensor,
    state: Mapping[str, Tensor],
    reading: Reading,
    *,
    dropout: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Read x with all blocks: [B,T,C] -> [B,T,C], and the tensors of the next state, by name.

    state holds the tensors of the state before x. With recompute, the backward pass recomputes the
    activations inside each block instead of saving them.
    """
    architecture = config.architecture
    before = zip(*(state[name].unbind(0) for name in architecture.state_fields), strict=True)
    after, handed = [], ()
    for block, parts in zip(blocks, before, strict=True):
        arguments = x, architecture.layer_state(*parts), reading, dropout, *handed
        if recompute and torch.is_grad_enabled():
            x, layer, *handed = checkpoint(block, *arguments, use_reentrant=False)
        else:
            x, layer, *handed = block(*arguments)
        after.append(layer)
    fields = zip(architecture.state_fields, zip(*after, strict=True), strict=True)
    return x, {name: torch.stack(parts) for name, parts in fields}


def learning_rate_scales(prefix: str, blocks: Sequence[Block]) -> dict[str, float]:
    """The factors of the learning rate that differ from 1, for blocks called PREFIX.0 and so on."""
    return {
        f"{prefix}.{i}.{part}.{name}": scale
        for i, block in enumerate(blocks)
        for part in ("att", "ffn")
        for name, scale in getattr(block, part).learning_rate_scales().items()
    }


def starting_values(
    config: ModelConfig, *, seed: int = 0, embedding_bound: float = 1e-4
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter's name and starting value (RWKV-v4neo), on the CPU, block by block.

    The embedding is uniform within embedding_bound, which is the first learning rate in the
    official code: a tiny embedding changes its direction in few steps, and ln0 amplifies it.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.empty(config.vocab_size, config.width)
    yield "emb.weight", embedding.uniform_(-embedding_bound, embedding_bound, generator=generator)
    for layer in range(config.num_layers):
        block = Block(config, layer)
        block.att.initialize(generator)
        block.ffn.initialize(generator)
        for name, value in block.named_parameters(f"blocks.{layer}"):
            yield name, value.detach()
    for name, value in LayerNorm(config.width, FINAL_EPSILON).named_parameters("ln_out"):
        yield name, value.detach()
    head = Linear(config.width, config.vocab_size)
    head.orthogonal_(_HEAD_SCALE, generator)
    yield "head.weight", head.weight.detach()


class Model(nn.Module):
    """An RWKV language model; its parameters have the names of the official files.

    A new model has the official starting values, drawn from `seed` and `embedding_bound` (see
    starting_values). `dropout` acts in training mode only: after the embedding and on both sums of
    every block, as in RWKV-LM. The attribute `backend` names a kernel of the recurrence (see
    ops.available_backends); None takes the fastest. With the attribute `recompute` the backward
    pass recomputes the activations inside each block instead of saving them. The attribute `origin`
    is the fingerprint of the model that the weights were quantized from: its states fit this one.
    """

    batch_invariant = False  # torch sums in another order when a batch has another shape.

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        dropout: float = 0.0,
        embedding_bound: float = 1e-4,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
        self.config = config
        self.dropout = dropout
        self.recompute = False
        self.origin: str | None = None
        self.emb = nn.Embedding(
            config.vocab_size,
            config.width,
            _weight=torch.empty(config.vocab_size, config.width),
        )
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.ln_out = LayerNorm(config.width, FINAL_EPSILON)
        self.head = Linear(config.width, config.vocab_size)
        if self.emb.weight.device.type != "meta":
            values = starting_values(config, seed=seed, embedding_bound=embedding_bound)
            with torch.no_grad():
                for name, value in values:
                    self.get_parameter(name).copy_(value)

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @property
    def backend(self) -> str | None:
        """The kernel of the recurrence that all blocks use; None takes the fastest."""
        return cast(str | None, self._blocks[0].att.backend)

    @backend.setter
    def backend(self, name: str | None) -> None:
        for block in self._blocks:
            block.att.backend = name

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.emb.weight.device

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Model:
        """Make a model, in evaluation mode, of existing tensors under their official names.

        With dtype None all tensors get the dtype of the embedding; decays are never narrower than
        float32. ValueError names tensors that are missing, unexpected or of the wrong shape.
        """
        with torch.device("meta"):
            model = cls(config)
        wanted = model.state_dict()
        if missing := sorted(set(wanted) - set(tensors)):
            raise ValueError(f"{len(missing)} tensors are missing, first {missing[:3]}")
        if unexpected := sorted(set(tensors) - set(wanted)):
            raise ValueError(f"{len(unexpected)} unexpected tensors, first {unexpected[:3]}")
        dtype = dtype or tensors["emb.weight"].dtype
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {dtype!r}; it must be one like torch.float32")
        exact = {}
        for name, want in wanted.items():
            if not _squeezed_alike(tensors[name].shape, want.shape):
                raise ValueError(
                    f"{name} is {list(tensors[name].shape)}; the sizes of this model want "
                    f"{list(want.shape)}"
                )
            keep = config.architecture.is_float32(name) and dtype.itemsize < 4
            exact[name] = (
                tensors[name].reshape(want.shape).to(device, torch.float32 if keep else dtype)
            )
        model.load_state_dict(exact, assign=True)
        return model.eval()

    def learning_rate_scales(self) -> dict[str, float]:
        """The factors of the learning rate that differ from 1, by parameter name."""
        return learning_rate_scales("blocks", self._blocks)

    def empty_state(self, batch: int = 1, *, dtype: torch.dtype | None = None) -> State:
        """The state of rows that have read nothing."""
        like = torch.empty(0, device=self.emb.weight.device, dtype=dtype or self.emb.weight.dtype)
        tensors = self.config.architecture.empty_state(self.config, batch, like)
        return State(tensors, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, State]:
        """Logits for the token after each position, [B,T] -> [B,T,V], and the next state.

        state is the one that an earlier call returned; None means rows that have read nothing.
        lengths [B], each in 0..T, is the number of real tokens in each row: the state returned has
        read only those, and logits beyond them mean nothing. resets [B,T] bool starts a row afresh
        at every true position, so that packed documents do not see each other.
        dtype is the type of activations (None: that of the parameters).
        """
        x, state = self.features(tokens, state, lengths=lengths, resets=resets, dtype=dtype)
        return self.head(x), state

    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, State]:
        """Features for the head, [B,T] -> [B,T,C], and the next state; arguments as in `forward`.

        Prefill needs logits of one position only, and training computes the loss in pieces.
        """
        dtype = dtype or self.emb.weight.dtype
        check_inputs(self.config, tokens, state, lengths, resets)
        if state is None:
            state = self.empty_state(tokens.shape[0], dtype=dtype)
        x = F.dropout(self.emb(tokens).to(dtype), self.dropout, self.training)
        x, tensors = through(
            self._blocks,
            self.config,
            x,
            state.tensors,
            Reading(resets, lengths),
            dropout=self.dropout,
            recompute=self.recompute,
        )
        read = tokens.shape[1] if lengths is None else lengths
        return self.ln_out(x), State(tensors, state.tokens + read)

    def fingerprint(self) -> str:
        """Identify the model that states belong to (see the function `fingerprint`)."""
        return self.origin or fingerprint(self.config, self.state_dict())

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights."""
        return sum(x.nbytes for x in self.parameters())

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that one token of one row reads: all but the embedding."""
        return self.weight_bytes - self.emb.weight.nbytes

    def evaluating(self) -> AbstractContextManager[None]:
        """Switch dropout off inside a `with` block; then every module gets its own mode back."""
        return evaluating(self)

    def save_state(self, state: State, path: str | Path) -> None:
        """Write a state of this model to a file (see `State.save`)."""
        state.save(path, self.fingerprint())

    def load_state(self, path: str | Path) -> State:
        """Read a state of this model from a file, on its device (see `State.load`)."""
        return State.load(path, self.fingerprint()).to(self.device)


def fingerprint(config: ModelConfig, tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the sizes and of a sample of every tensor, equal in float32 and bfloat16."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        stride = max(1, tensor.numel() // _FINGERPRINT_SAMPLES)
        sample = tensor.detach().reshape(-1)[::stride].bfloat16().view(torch.int16).cpu()
        digest.update(name.encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _squeezed_alike(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are equal without their axes of size 1."""
    return [n for n in one if n != 1] == [n for n in other if n != 1]
