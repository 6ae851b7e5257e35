"""What cpu_inference.py compares, behind one interface; each runs in a process of its own.

python benchmarks/_engines.py SPEC     serves one engine: JSON commands in, JSON answers out
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from receptance.engine import load_engine
from receptance.formats.names_hf import to_hf
from receptance.inference import measure
from receptance.inference.generation import prefill
from receptance.storage.checkpoint import load

PR_SET_PDEATHSIG = 1
PROMPT = [i * 7919 % 500 for i in range(1, 25)]


class Candidate(Protocol):
    """One engine with one model."""

    def logits(self, tokens: list[int]) -> Tensor:
        """Of what follows the tokens, after none: [V] float32."""

    def decode(self, tokens: int, batch: int) -> None:
        """Generate greedily, going on where the last call stopped."""

    def prefill(self, tokens: list[int], chunk: int) -> None:
        """Read a prompt and score what follows it; chunk matters to rwkv.cpp alone."""

    def about(self) -> dict[str, float]:
        """Figures that only this kind of engine has."""


class Ours:
    """`load_engine`, whatever it chooses."""

    def __init__(self, spec: dict[str, Any]) -> None:
        dtype = spec["dtype"]
        own = dtype if dtype.startswith(("float", "bfloat")) else None
        self.engine, _ = load_engine(spec["path"], dtype=own)
        self._decoders: dict[int, Callable[[int], None]] = {}

    def logits(self, tokens: list[int]) -> Tensor:
        return prefill(self.engine, [tokens])[0][0].float()

    def decode(self, tokens: int, batch: int) -> None:
        if batch not in self._decoders:
            self._decoders[batch] = measure.decoder(self.engine, batch)
        self._decoders[batch](tokens)

    def prefill(self, tokens: list[int], chunk: int) -> None:
        prefill(self.engine, [tokens])

    def about(self) -> dict[str, float]:
        return {
            "weights": self.engine.weight_bytes,
            "bytes per token": self.engine.bytes_per_token,
            "skipped": getattr(self.engine, "skipped", 0.0),
        }


class Reference(Ours):
    """The torch model in float32, its matrices rounded to the type that is to be checked."""

    def __init__(self, spec: dict[str, Any]) -> None:
        model, _ = load(spec["path"], dtype=torch.float32)
        dtype = getattr(torch, spec["dtype"], None)
        if dtype in (torch.bfloat16, torch.float16):
            version, layers = model.config.architecture, range(model.config.num_layers)
            factors = (f"blocks.{layer}.{x}" for layer in layers for x in version.native_factors)
            for name in (*version.layouts(model.config), *factors):
                parameter = model.get_parameter(name)
                parameter.data = parameter.data.to(dtype).float()
        self.engine, self._decoders = model, {}


class RwkvCpp:
    """librwkv.so through its C interface."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.library = ctypes.CDLL(spec["library"])
        for name in ("rwkv_init_from_file", "rwkv_get_state_len", "rwkv_get_logits_len"):
            getattr(self.library, name).restype = ctypes.c_size_t
        for name in ("rwkv_eval", "rwkv_eval_sequence_in_chunks"):
            getattr(self.library, name).restype = ctypes.c_bool
        path = ctypes.c_char_p(spec["path"].encode())
        self.context = ctypes.c_void_p(self.library.rwkv_init_from_file(path, spec["threads"], 0))
        if not self.context.value:
            raise SystemExit(f"rwkv.cpp does not load {spec['path']}")
        floats = ctypes.c_float
        self.state = (floats * self.library.rwkv_get_state_len(self.context))()
        self.scores = (floats * self.library.rwkv_get_logits_len(self.context))()
        self.library.rwkv_init_state(self.context, self.state)
        self.token = 5

    def logits(self, tokens: list[int]) -> Tensor:
        self.library.rwkv_init_state(self.context, self.state)
        for token in tokens:
            self._step(token)
        return torch.tensor(np.ctypeslib.as_array(self.scores))

    def decode(self, tokens: int, batch: int) -> None:
        assert batch == 1, "rwkv.cpp has no batches"
        scores = np.ctypeslib.as_array(self.scores)
        for _ in range(tokens):
            self._step(self.token)
            self.token = int(scores.argmax())

    def _step(self, token: int) -> None:
        ok = self.library.rwkv_eval(self.context, token, self.state, self.state, self.scores)
        assert ok, "rwkv_eval failed"

    def prefill(self, tokens: list[int], chunk: int) -> None:
        ids = (ctypes.c_uint32 * len(tokens))(*tokens)
        sizes = ctypes.c_size_t(len(tokens)), ctypes.c_size_t(chunk)
        self.library.rwkv_init_state(self.context, self.state)
        ok = self.library.rwkv_eval_sequence_in_chunks(
            self.context, ids, *sizes, self.state, self.state, self.scores
        )
        assert ok, "rwkv_eval_sequence_in_chunks failed"

    def about(self) -> dict[str, float]:
        return {}


class RwkvPackage:
    """The `rwkv` package of BlinkDL, as its documentation runs it on a CPU."""

    def __init__(self, spec: dict[str, Any]) -> None:
        os.environ["RWKV_JIT_ON"], os.environ["RWKV_CUDA_ON"] = "1", "0"
        from rwkv.model import RWKV

        short = {"float32": "fp32", "bfloat16": "bf16"}[spec["dtype"]]
        self.model = RWKV(model=spec["path"].removesuffix(".pth"), strategy=f"cpu {short}")
        self.state, self.token = None, 5

    def logits(self, tokens: list[int]) -> Tensor:
        return self.model.forward(tokens, None)[0].float()

    def decode(self, tokens: int, batch: int) -> None:
        assert batch == 1, "the rwkv package has no batches"
        for _ in range(tokens):
            scores, self.state = self.model.forward([self.token], self.state)
            self.token = int(scores.argmax())

    def prefill(self, tokens: list[int], chunk: int) -> None:
        self.model.forward(tokens, None)

    def about(self) -> dict[str, float]:
        return {}


class Transformers:
    """RwkvForCausalLM with the same weights."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from transformers import RwkvConfig, RwkvForCausalLM

        model, _ = load(spec["path"])
        sizes = model.config
        config = RwkvConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.num_layers,
            intermediate_size=sizes.ffn_width,
            rescale_every=0,
        )
        self.model = RwkvForCausalLM(config).eval()
        self.model.load_state_dict({to_hf(name): x for name, x in model.state_dict().items()})
        self.model.to(getattr(torch, spec["dtype"]))
        self.state, self.token = None, torch.tensor([[5]])

    def logits(self, tokens: list[int]) -> Tensor:
        return self.model(torch.tensor([tokens])).logits[0, -1].float()

    def decode(self, tokens: int, batch: int) -> None:
        assert batch == 1, "transformers' batches are not compared: they are wrong"
        for _ in range(tokens):
            output = self.model(self.token, state=self.state, use_cache=True)
            self.state, self.token = output.state, output.logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self, tokens: list[int], chunk: int) -> None:
        self.model(torch.tensor([tokens]), use_cache=True)

    def about(self) -> dict[str, float]:
        return {}


def llama_cpp(spec: dict[str, Any]) -> Candidate:
    """llama.cpp, whose bindings are imported in its own process alone."""
    from _llama_cpp import LlamaCpp

    return LlamaCpp(spec)


ENGINES: dict[str, Callable[[dict[str, Any]], Candidate]] = {
    "receptance": Ours,
    "torch": Reference,
    "rwkv.cpp": RwkvCpp,
    "rwkv": RwkvPackage,
    "transformers": Transformers,
    "llama.cpp": llama_cpp,
}


def answer(engine: Candidate, command: dict[str, Any]) -> dict[str, Any]:
    """Do what a command says."""
    tokens, began = command.get("tokens", 0), time.perf_counter()
    match command["do"]:
        case "decode":
            batch = command.get("batch", 1)
            engine.decode(tokens, batch)
            return {"rate": tokens * batch / (time.perf_counter() - began)} | engine.about()
        case "prefill":
            prompt = [i * 7919 % 500 for i in range(tokens)]
            engine.prefill(prompt, command.get("chunk", 64))
            return {"rate": tokens / (time.perf_counter() - began)}
        case "logits":
            return {"logits": engine.logits(PROMPT).tolist()}
        case "memory":
            engine.decode(100, 1)
            return {"resident": measure.resident_bytes()} | engine.about()
    raise ValueError(f"unknown command {command}")


@torch.no_grad()
def main() -> None:
    """Serve until standard input ends; what engines print goes to standard error."""
    if sys.platform == "linux":  # ... and die with the process that asked, however it ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bare, began = measure.resident_bytes(), time.perf_counter()
    if spec["engine"] == "memory bus":
        serve = bandwidth
    else:
        engine = ENGINES[spec["engine"]](spec)
        serve = lambda command: answer(engine, command)  # noqa: E731
    print(
        json.dumps({"load s": time.perf_counter() - began, "bare": bare}), file=answers, flush=True
    )
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


def bandwidth(command: dict[str, Any]) -> dict[str, Any]:
    """How fast memory is read, in answer to whatever command."""
    rate, how = measure.read_bandwidth()
    return {"rate": rate, "how": how}


if __name__ == "__main__":
    main()
