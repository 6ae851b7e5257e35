"""The same random weights in every format that cpu_inference.py compares, made when asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import receptance
from receptance.config import PUBLISHED_SIZES, ModelConfig
from receptance.formats.ggmf import write_ggmf
from receptance.inference.measure import random_tensors
from receptance.model import Model
from receptance.storage.checkpoint import save
from receptance.tokenizer import Tokenizer, WorldTokenizer, load_tokenizer

SIZES = PUBLISHED_SIZES | {
    "tiny": ModelConfig(vocab_size=512, width=128, num_layers=2),
    "rwkv7-tiny": ModelConfig(version=7, vocab_size=512, width=128, num_layers=2),
}
QUANTIZED = ("int8", "int4")
QUANTIZE = """
import ctypes, sys
quantize = ctypes.CDLL(sys.argv[1]).rwkv_quantize_model_file
quantize.restype = ctypes.c_bool
sys.exit(not quantize(*(ctypes.c_char_p(word.encode()) for word in sys.argv[2:])))
"""
ZEROS = 0.85  # of the activations of channel mixing, in the sparse model


class Files:
    """A folder with one model in many files."""

    def __init__(
        self,
        folder: Path,
        size: str,
        tokenizer: str | None,
        library: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.size, self.folder, self.config = size, folder / size, SIZES[size]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer, self._library, self._say = tokenizer, library, say

    def ours(self, dtype: str = "float32", *, sparse: bool = False) -> str:
        """A directory of ours: the float32 checkpoint, or one that was quantized from it."""
        name = "sparse" if sparse else "dense"
        if dtype not in QUANTIZED:
            return self._once(f"{name}-float32", lambda path: self._save(path, sparse))
        source = self.ours(sparse=sparse)
        words = [sys.executable, "-m", "receptance", "quantize", source, "--to", dtype, "--out"]
        return self._once(
            f"{name}-{dtype}",
            lambda path: subprocess.run([*words, str(path)], check=True, capture_output=True),
        )

    def pth(self) -> str:
        """What the `rwkv` package loads."""
        return self._once("model.pth", lambda path: torch.save(self._tensors(), path))

    def ggmf(self, kind: str) -> str:
        """What rwkv.cpp loads; quantized by itself."""
        if kind in ("FP32", "FP16"):
            return self._once(
                f"{kind}.bin",
                lambda path: write_ggmf(path, self.config, self._tensors(), kind),
            )
        # As its documentation does: embedding and head stay as they are in the source.
        source = self.ggmf("FP16")
        return self._once(f"{kind}.bin", lambda path: self._quantize(source, path, kind))

    def gguf(self, kind: str) -> str:
        """What llama.cpp loads; quantized by itself, which keeps some matrices more precise."""
        import _llama_cpp as peer

        if kind in ("F32", "F16"):
            _, tokenizer = receptance.load(self.ours())
            return self._once(
                f"{kind}.gguf",
                lambda path: peer.write(path, self.config, self._tensors(), tokenizer, kind),
            )
        source = self.gguf("F16")
        return self._once(f"{kind}.gguf", lambda path: peer.quantize(source, path, kind))

    def _once(self, name: str, make: Callable[[Path], object]) -> str:
        path = self.folder / name
        if not path.exists():
            self._say(f"{self.size} making the model file {name}")
            with tempfile.TemporaryDirectory(prefix="partial-", dir=self.folder) as partial:
                make(Path(partial, name))
                os.rename(Path(partial, name), path)
        return str(path)

    def _tensors(self) -> dict[str, Tensor]:
        model, _ = receptance.load(self.ours())
        return {name: x.detach() for name, x in model.state_dict().items()}

    def _save(self, path: Path, sparse: bool) -> None:
        if sparse:
            model, tokenizer = receptance.load(self.ours())
            make_sparse(model)
        else:
            model = Model.from_tensors(self.config, random_tensors(self.config))
            size = self.config.vocab_size
            tokenizer = load_tokenizer(self._tokenizer) if self._tokenizer else vocabulary(size)
        save(model, path, tokenizer)

    def _quantize(self, source: str, path: Path, kind: str) -> None:
        # A process of its own, because it prints a line for each tensor.
        words = [sys.executable, "-c", QUANTIZE, str(self._library), source, str(path), kind]
        subprocess.run(words, check=True, capture_output=True)


def vocabulary(size: int) -> Tokenizer:
    """A World vocabulary of so many ids: every byte, then pairs of bytes."""
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    tokens = [bytes([value]) for value in range(256)] + [next(pairs) for _ in range(size - 257)]
    lines = (b"%d %r %d\n" % (i, token, len(token)) for i, token in enumerate(tokens, start=1))
    return WorldTokenizer(b"".join(lines))


@torch.no_grad()
def make_sparse(model: Model) -> None:
    """Shift the keys of channel mixing so that relu makes ZEROS of them zero in every layer.

    A bias before the layer gives all of its inputs a common direction; along that, each row of the
    matrix is moved by as much as the wanted quantile of its outputs.
    """
    tokens = torch.arange(256)[None] * 7919 % model.config.vocab_size
    for block in model.blocks:
        block.ln2.bias.copy_(torch.full_like(block.ln2.bias, 0.5))
    for block in model.blocks:  # in order: each changes what those after it see
        weight = block.ffn.key.weight
        inputs: list[Tensor] = []
        hook = block.ffn.key.register_forward_pre_hook(
            lambda _, args, kept=inputs: kept.append(args[0])
        )
        model(tokens)
        hook.remove()
        direction = inputs[0][0].mean(0)
        outputs = inputs[0][0] @ weight.T
        weight -= outputs.flatten().quantile(ZEROS) * direction / direction.square().sum()
