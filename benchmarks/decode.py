"""Decoding and prefill of the 169M shape in plain torch, against transformers in the same run.

    python benchmarks/decode.py [--dtype float32]

Checks that both give the same logits first. Then the peak memory of prefill at growing lengths,
each in a process of its own. JSON on the last line.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from _common import report, time_in_turns
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

from receptance.config import published
from receptance.formats.names_hf import to_hf
from receptance.inference.generation import prefill
from receptance.model import Model

TOKENS = 16
LENGTHS = (512, 4096, 16384)


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prefill:
        print(prefill_memory(options.prefill))
        return
    dtype = getattr(torch, options.dtype)
    ours, theirs = models(dtype)
    check(ours, theirs, dtype)
    token = torch.tensor([[5]])
    _, state = ours(token)
    peer_state = theirs(token, use_cache=True).state
    seconds = time_in_turns(
        {
            "receptance": lambda: decode(ours, token, state),
            "transformers RWKV": lambda: decode_peer(theirs, token, peer_state),
        },
        rounds=options.rounds,
    )
    results: dict[str, object] = {
        "shape": f"169M (12 x 768, V 50277), batch 1, {options.dtype}",
        **{f"{name}: tokens/s": TOKENS / s for name, s in seconds.items()},
        "receptance / transformers RWKV": seconds["transformers RWKV"] / seconds["receptance"],
    }
    for length in LENGTHS:
        command = [sys.executable, __file__, "--prefill", str(length)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[f"prefill of {length:,} tokens: peak MB over loaded model"] = float(output)
    report(results)


@torch.no_grad()
def models(dtype: torch.dtype) -> tuple[Model, RwkvForCausalLM]:
    """The same random weights in both."""
    sizes = published("169m")
    ours = Model(sizes).eval()
    for parameter in ours.parameters():  # zero matrices would skip nothing, but check nothing
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    config = RwkvConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        rescale_every=0,
    )
    theirs = RwkvForCausalLM(config).eval()
    theirs.load_state_dict({to_hf(name): x for name, x in ours.state_dict().items()})
    return ours.to(dtype), theirs.to(dtype)


@torch.no_grad()
def check(ours: Model, theirs: RwkvForCausalLM, dtype: torch.dtype) -> None:
    """The same logits, or no timing."""
    tokens = torch.arange(1, 33)[None]
    mine, peer = ours(tokens)[0].float(), theirs(tokens).logits.float()
    limit = 1e-3 if dtype == torch.float32 else 0.1
    difference = float((mine - peer).abs().max() / peer.abs().max())
    if not difference < limit:
        raise SystemExit(f"logits differ by {difference:.1e} of the largest")


@torch.no_grad()
def decode(model: Model, token: Tensor, state: object) -> None:
    """Greedy tokens, one at a time."""
    for _ in range(TOKENS):
        logits, state = model(token, state)
        token = logits[:, -1].argmax(-1, keepdim=True)


@torch.no_grad()
def decode_peer(model: RwkvForCausalLM, token: Tensor, state: list[Tensor]) -> None:
    """The same with transformers, which updates its state in place."""
    state = [x.clone() for x in state]
    for _ in range(TOKENS):
        output = model(token, state=state, use_cache=True)
        state, token = output.state, output.logits[:, -1].argmax(-1, keepdim=True)


def prefill_memory(length: int) -> float:
    """Megabytes by which the peak grows over the loaded model while a prompt is read (Linux)."""
    model = Model(published("169m")).eval()
    prefill(model, [[1, 2, 3]])
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    prefill(model, [[i % 1000 for i in range(length)]])
    return memory("VmHWM") - before


def memory(field: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    main()
