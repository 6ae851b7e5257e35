"""llama.cpp through the bindings of llama-cpp-python, for _engines.py and _weights.py.

LLAMA_CPP_LIB_PATH, which the bindings read, may name the folder of another build of the library.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from receptance.config import ModelConfig
from receptance.formats.gguf import stored_kinds, write_gguf
from receptance.tokenizer import Tokenizer

_CONTEXT = 4096  # no longer prompt is measured
_FILE_TYPES = {"Q8_0": 7, "Q4_0": 2}  # llama_ftype
_QUIET = llama_cpp.llama_log_callback(lambda *_: None)


class LlamaCpp:
    """A GGUF file in the engine that reads it, with the threads of one core each."""

    def __init__(self, spec: dict[str, Any]) -> None:
        _start()
        options = llama_cpp.llama_model_default_params()
        # With its copies of weights for AMX it crashes on quantized RWKV-7 (llama-cpp-python
        # 0.3.36); those for other instructions are its fastest way.
        options.use_extra_bufts = "amx_tile" not in Path("/proc/cpuinfo").read_text()
        self.model = llama_cpp.llama_model_load_from_file(spec["path"].encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {spec['path']}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = _CONTEXT
        settings.n_threads = settings.n_threads_batch = spec["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.context, "llama_init_from_model failed"
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size, self.token = llama_cpp.llama_vocab_n_tokens(vocabulary), 5

    def logits(self, tokens: list[int]) -> Tensor:
        """Of what follows the tokens, after none: [V] float32."""
        self._forget()
        for token in tokens:
            found = self._read([token])
        return torch.tensor(found)

    def decode(self, tokens: int, batch: int) -> None:
        """Generate greedily, going on where the last call stopped."""
        assert batch == 1, "batches of llama.cpp are not compared"
        for _ in range(tokens):
            self.token = int(self._read([self.token]).argmax())

    def prefill(self, tokens: list[int], chunk: int) -> None:
        """Read a prompt and score what follows it, in pieces of its own choice."""
        self._forget()
        self._read(tokens)

    def about(self) -> dict[str, float]:
        """Nothing more is known of it."""
        return {}

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _read(self, tokens: list[int]) -> np.ndarray:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(ids, len(tokens))
        assert llama_cpp.llama_decode(self.context, batch) == 0, "llama_decode failed"
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (self.size,))


def write(
    path: Path, config: ModelConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer, kind: str
) -> None:
    """A file of matrices that are F32 or F16."""
    kinds = dict.fromkeys(config.architecture.layouts(config), kind)
    write_gguf(path, config, tensors, stored_kinds(config, kinds), tokenizer)


def quantize(source: str, path: Path, kind: str) -> None:
    """Let llama.cpp quantize a file as its own tool does."""
    _start()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = _FILE_TYPES[kind], 1
    words = source.encode(), str(path).encode()
    if llama_cpp.llama_model_quantize(*words, ctypes.byref(options)) != 0:
        raise SystemExit(f"llama.cpp does not quantize {source}")


def _start() -> None:
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
