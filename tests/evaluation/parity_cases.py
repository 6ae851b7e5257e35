"""The harness's own class over transformers' models, and our engines over the same weights."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from tiny import make_model, small_bpe
from torch import Tensor

from receptance.config import ModelConfig
from receptance.engine.base import EvaluationOnly
from receptance.formats.hf import write_hf
from receptance.state import State

VOCABULARY = 300
"""That of `tiny.small_bpe`."""


def rwkv_pair(folder: Path):
    """Our model, and transformers' RwkvForCausalLM with the weights that our writer wrote."""
    from transformers import AutoModelForCausalLM

    model = make_model(VOCABULARY, width=32, layers=2)
    tensors = {name: x.detach() for name, x in model.state_dict().items()}
    layout = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    write_hf(folder, model.config, layout, tensors, shard_bytes=1e9)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.rescale_every == 0  # Otherwise an evaluation rewrites the weights.
    return model, theirs.eval()


def neox_pair():
    """An engine over a small GPT-NeoX, and that model itself."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # Else all tokens are nearly equally likely.
    return HistoryEngine(model), model


def hf_lm(model, folder: Path, *, max_length: int = 2048, batch_size: int = 3):
    """The harness's HFLM over a model of transformers and the same tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    name = small_bpe(VOCABULARY).save(folder)[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / name), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        device="cpu",
    )


class HistoryEngine(EvaluationOnly):
    """An `Engine` over any model of transformers: its state is all that was read, and no more."""

    batch_invariant = False
    longest = 512

    def __init__(self, model) -> None:
        self._model = model
        sizes = ModelConfig(vocab_size=model.config.vocab_size, width=32, num_layers=1)
        self.config, self.device = sizes, torch.device("cpu")
        self.head = model.get_output_embeddings()
        self.weight_bytes = self.bytes_per_token = 0

    def fingerprint(self) -> str:
        return "history"

    def evaluating(self):
        return contextlib.nullcontext()

    @torch.no_grad()
    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        rows, time = tokens.shape
        assert resets is None
        if state is None:
            empty = torch.zeros(1, rows, self.longest, dtype=torch.int64)
            state = State({"read": empty}, torch.zeros(rows, dtype=torch.int64))
        counts = torch.full((rows,), time) if lengths is None else lengths
        history, features = state.tensors["read"].clone(), []
        for row in range(rows):
            begin, count = int(state.tokens[row]), int(counts[row])
            history[0, row, begin : begin + count] = tokens[row, :count]
            own = torch.zeros(time, self.head.in_features)
            if count:
                read = history[0, row, : begin + count]
                hidden = self._model.base_model(read[None]).last_hidden_state[0]
                own[:count] = hidden[begin:]
            features.append(own)
        return torch.stack(features), State({"read": history}, state.tokens + counts)
