"""Transformers of the library transformers: GPT-NeoX, Pythia's architecture, and Llama's."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from receptance.data.batches import Batch
from receptance.evaluation.compare.families import Decoder, Family, Shape
from receptance.storage.checkpoint import read_tensors, write_tensors
from receptance.tokenizer import Tokenizer
from receptance.training.objective import head_loss
from receptance.training.options import TrainOptions

# A head has the largest of these widths of which at least _LEAST_HEADS fit, else the smallest that
# divides the width.
_HEAD_WIDTHS = (64, 32, 16, 8)
_LEAST_HEADS = 4
_WEIGHTS = "model"
_LLAMA_DEVIATION = 0.02


class TransformerObjective(nn.Module):
    """A causal model of transformers with the objective of training, which `head_loss` computes."""

    def __init__(self, model: Any, options: TrainOptions) -> None:
        super().__init__()
        self.model = model
        self.dtype = getattr(torch, options.dtype)
        self.penalties = {
            "max_logit_penalty": options.max_logit_penalty,
            "z_loss": options.z_loss,
        }

    def forward(
        self, batch: Batch, state: None, total: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Objective and cross entropy of the rows, both over total; a row begins from nothing."""
        assert state is None and batch.resets is None
        base = self.model.base_model
        given = {name: x.to(self.dtype) for name, x in base.named_parameters()}
        found = functional_call(base, given, (batch.inputs,), {"use_cache": False})
        features = found.last_hidden_state
        weight = self.model.get_output_embeddings().weight
        value, entropy = head_loss(
            features, weight, batch.targets, batch.mask, total=total, **self.penalties
        )
        return value, entropy, {}


class Baseline(Family):
    """An architecture of transformers; biases begin at 0, norms at 1 and matrices normal."""

    residual_outputs: tuple[str, ...]
    """How the names of the matrices end whose products are added to the residual stream."""

    @abstractmethod
    def deviations(self, shape: Shape) -> tuple[float, float]:
        """The deviations of the starting values: of those matrices, after that of all others."""

    @abstractmethod
    def build(self, shape: Shape, heads: int) -> Any:
        """The model of transformers, with the starting values of that library."""

    def _build(self, shape: Shape) -> Any:
        try:
            import transformers
        except ImportError:
            raise ValueError(
                f"{self.name} is an architecture of transformers, which is not installed: "
                "pip install transformers"
            ) from None
        heads = shape.width // head_width(shape.width)
        model = self.build(shape, heads)
        assert isinstance(model, transformers.PreTrainedModel)
        return model

    def check(self, shape: Shape) -> None:
        """ValueError if the width cannot be divided into heads."""
        head_width(shape.width)

    def skeleton(self, shape: Shape) -> nn.Module:
        """The model on the meta device."""
        with torch.device("meta"):
            model: nn.Module = self._build(shape)
        return model

    def ends(self, model: Any) -> tuple[Tensor, Tensor]:
        """The matrices of the embedding and of the head."""
        return model.get_input_embeddings().weight, model.get_output_embeddings().weight

    def mixing_flops(self, shape: Shape, context: int) -> int:
        """The scores of attention and the sums that they weigh."""
        # Position t has t scores and t weighted values, each of C products and sums, and t is
        # (context + 1) / 2 on average.
        return 2 * shape.layers * shape.width * (context + 1)

    def objective(self, shape: Shape, options: TrainOptions) -> TransformerObjective:
        """A new model of transformers with the objective of training."""
        with torch.random.fork_rng([]):  # transformers draws from the global generator
            model = self._build(shape)
        self._initialize(model, shape, torch.Generator().manual_seed(options.seed))
        return TransformerObjective(model.train(), options)

    @torch.no_grad()
    def _initialize(self, model: Any, shape: Shape, generator: torch.Generator) -> None:
        usual, output = self.deviations(shape)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                deviation = output if name.endswith(self.residual_outputs) else usual
                parameter.normal_(0, deviation, generator=generator)

    def save(self, model: Any, folder: Path, tokenizer: Tokenizer) -> None:
        """Write the model as transformers would."""
        # What save_pretrained and from_pretrained do, without the progress bars that they print.
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        tokenizer.save(folder)
        write_tensors(model.state_dict(), folder, _WEIGHTS)

    def decoder(self, folder: Path) -> Decoder:
        """Load the model with a cache of keys and values."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.random.fork_rng([]):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model.load_state_dict(read_tensors(folder, _WEIGHTS))
        return CachingDecoder(model.eval())


class NeoX(Baseline):
    """GPTNeoXForCausalLM as Pythia has it: parallel residual, a quarter of each head rotated.

    Starting values are those that the GPT-NeoX library gave Pythia ("small init", "wang init").
    """

    name, label = "neox", "GPT-NeoX (Pythia's architecture)"
    residual_outputs = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")

    def deviations(self, shape: Shape) -> tuple[float, float]:
        return math.sqrt(2 / (5 * shape.width)), 2 / (shape.layers * math.sqrt(shape.width))

    def usual_ffn_width(self, width: int) -> int:
        """Four times the width."""
        return 4 * width

    def build(self, shape: Shape, heads: int) -> Any:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        config = GPTNeoXConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            intermediate_size=shape.ffn_width,
        )
        return GPTNeoXForCausalLM(config)


class Llama(Baseline):
    """LlamaForCausalLM: RMSNorm, SwiGLU, rotary embedding, no biases.

    Starting values are those of transformers, whose deviation is 0.02 everywhere.
    """

    name, label = "llama", "Llama block (RMSNorm, SwiGLU, rotary embedding)"
    residual_outputs = ("self_attn.o_proj.weight", "mlp.down_proj.weight")

    def deviations(self, shape: Shape) -> tuple[float, float]:
        return _LLAMA_DEVIATION, _LLAMA_DEVIATION

    def usual_ffn_width(self, width: int) -> int:
        """Eight thirds of the width, as SwiGLU has three matrices."""
        return -(-8 * width // 3)

    def build(self, shape: Shape, heads: int) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            intermediate_size=shape.ffn_width,
        )
        return LlamaForCausalLM(config)


class CachingDecoder:
    """A model of transformers with the cache of keys and values that its `generate` uses."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache: Any = DynamicCache(config=model.config)
        # Older releases know the argument by its longer name alone.
        known = inspect.signature(model.forward).parameters
        self.argument = "cache" if "cache" in known else "past_key_values"
        self.next = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Read tokens, and choose the next one."""
        self._advance(tokens[None])

    @torch.no_grad()
    def step(self) -> None:
        """Read the token that was chosen last, and choose the next one."""
        self._advance(self.next)

    def _advance(self, tokens: Tensor) -> None:
        found = self.model(tokens, **{self.argument: self.cache}, logits_to_keep=1)
        self.next = found.logits.argmax(-1)

    @property
    def remembered(self) -> list[Tensor]:
        """The keys and values of all layers; nothing before the first token."""
        parts = [part for x in self.cache.layers for part in (x.keys, x.values)]
        return [part for part in parts if part is not None]


def head_width(width: int) -> int:
    """The channels of a head; ValueError if none of the usual numbers divides the width."""
    fitting = [size for size in _HEAD_WIDTHS if width % size == 0]
    if not fitting:
        raise ValueError(
            f"a width of {width} cannot be divided into heads; it must be a multiple of "
            f"{_HEAD_WIDTHS[-1]}"
        )
    return next((size for size in fitting if width // size >= _LEAST_HEADS), fitting[-1])
