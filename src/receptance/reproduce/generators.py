"""Models of random weights that generate text: RWKV, and four families of transformers.

What a token costs does not depend on the values of the weights. All families have the same width,
depth, feed-forward width and vocabulary; their exact parameters differ by biases, positions, and
heads that are tied to the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from receptance.config import ModelConfig
from receptance.engine.base import Engine
from receptance.engine.load import native_engine
from receptance.evaluation.compare.baselines import CachingDecoder, head_width
from receptance.evaluation.compare.families import Decoder, EngineDecoder
from receptance.inference.measure import random_tensors
from receptance.model import Model
from receptance.ops import native

STATE, TORCH, CACHE, NO_CACHE = "state", "state, plain torch", "KV cache", "no cache"
RWKV, TRANSFORMERS = "RWKV-4", ("GPT-NeoX", "OPT", "BLOOM", "GPT-Neo")
Precision = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes that all models have, and where they run."""

    width: int
    layers: int
    vocabulary: int
    positions: int
    """The longest text of families that learn their positions."""
    device: str
    dtype: Precision


class RereadingDecoder:
    """A transformer that reads the whole text again for every token, as the paper's runs did."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Append tokens to the text."""
        self.tokens = torch.cat([self.tokens, tokens[None]], dim=1)

    @torch.no_grad()
    def step(self) -> None:
        """Read the text, and append the most likely token."""
        found = self.model(self.tokens, use_cache=False).logits[:, -1:].argmax(-1)
        self.tokens = torch.cat([self.tokens, found], dim=1)

    @property
    def remembered(self) -> list[Tensor]:
        """The text itself."""
        return [self.tokens]


def decoder(model: str, how: str, setting: Setting) -> Decoder:
    """What generates one row: RWKV by the fastest kernels, or by torch as all others."""
    if model == RWKV:
        return watched(model, how, setting)[0] if how == TORCH else EngineDecoder(_engine(setting))
    transformer = _transformer(model, setting)
    return RereadingDecoder(transformer) if how == NO_CACHE else CachingDecoder(transformer)


def watched(model: str, how: str, setting: Setting) -> tuple[Decoder, nn.Module]:
    """A decoder whose tensors torch makes, so that their bytes can be counted, and its module."""
    if model == RWKV:
        kind = torch.bfloat16 if setting.dtype == "bfloat16" else torch.float32
        config = _config(setting)
        made = Model.from_tensors(config, random_tensors(config), device=setting.device, dtype=kind)
        return EngineDecoder(made.eval()), made
    found = decoder(model, how, setting)
    assert isinstance(found, (RereadingDecoder, CachingDecoder))
    return found, found.model


def runs_by(generator: Decoder) -> str:
    """What computes the steps of a decoder, in words."""
    engine = generator.engine if isinstance(generator, EngineDecoder) else None
    if engine is None or isinstance(engine, Model):
        return "plain torch"
    return "GPU kernels" if engine.device.type == "cuda" else "native kernels"


def parameters(model: str, setting: Setting) -> int:
    """The exact number of parameters."""
    if model == RWKV:
        return _config(setting).num_parameters
    with torch.device("meta"):
        return sum(x.numel() for x in _built(model, setting).parameters())


def _config(setting: Setting) -> ModelConfig:
    return ModelConfig(
        vocab_size=setting.vocabulary, width=setting.width, num_layers=setting.layers
    )


def _engine(setting: Setting) -> Engine:
    config = _config(setting)
    tensors, kind = random_tensors(config), setting.dtype
    if torch.device(setting.device).type == "cuda":
        from receptance.engine.gpu import gpu_engine  # This module imports Triton.

        return gpu_engine(config, tensors, kind, device=setting.device)
    if native.is_available():
        return native_engine(config, tensors, kind)
    if kind == "int8":
        raise ValueError("dtypes has int8, which the native kernels run, and these were not built")
    return Model.from_tensors(config, tensors, dtype=getattr(torch, kind)).eval()


def _transformer(name: str, setting: Setting) -> Any:
    if setting.dtype == "int8":
        raise ValueError("dtypes has int8, in which transformers has no models")
    with torch.random.fork_rng([]), torch.device(setting.device):
        return _built(name, setting).to(getattr(torch, setting.dtype)).eval()


def _built(name: str, it: Setting) -> Any:
    """The model of transformers with its own starting values."""
    import transformers
    from transformers import AutoModelForCausalLM

    heads = it.width // head_width(it.width)
    same = {
        "vocab_size": it.vocabulary,
        "hidden_size": it.width,
        "num_hidden_layers": it.layers,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    own: dict[str, dict[str, Any]] = {
        "GPT-NeoX": {"num_attention_heads": heads, "intermediate_size": 4 * it.width},
        "OPT": {
            "num_attention_heads": heads,
            "ffn_dim": 4 * it.width,
            "word_embed_proj_dim": it.width,
            "max_position_embeddings": it.positions,
        },
        "BLOOM": {"n_head": heads},
        "GPT-Neo": {
            "num_heads": heads,
            "attention_types": [[["global", "local"], it.layers // 2]],
            "max_position_embeddings": it.positions,
        },
    }
    kind = {"GPT-NeoX": "GPTNeoX", "OPT": "OPT", "BLOOM": "Bloom", "GPT-Neo": "GPTNeo"}[name]
    config = getattr(transformers, f"{kind}Config")(**same, **own[name])
    return AutoModelForCausalLM.from_config(config)
