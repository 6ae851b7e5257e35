"""Training steps against others: tokens/s, memory, share of the machine.

    python benchmarks/train_step.py [--dtype bfloat16] [--times 512 1024] [--batches 1 4]
    python benchmarks/train_step.py --version 7 --dtype float32 --times 512 --batches 1 --long 0

A step is forward, loss, backward, clipping and AdamW. For the 169M shape of RWKV-4 the peers are
transformers' RWKV with the same weights and its GPT-NeoX (the architecture of Pythia) of the same
width, depth and vocabulary, for the 0.1B shape of RWKV-7 rwkv7-hf with the same weights and our
RWKV-4 of the same width, depth and vocabulary. The peers that are not ours run under autocast for
bfloat16. Every measurement is a process of its own, so that its peak of memory is its own; each
candidate counts with its fastest batch. Checks first that the loss of the peer with the same
weights is ours. JSON on the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from _common import report
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, RwkvConfig, RwkvForCausalLM

from receptance.config import ModelConfig, published
from receptance.data.batches import Batch
from receptance.formats.hf_config import config_fields
from receptance.formats.names_hf import is_transposed, to_hf
from receptance.model import Model
from receptance.training import TrainOptions, head_loss, make_optimizer
from receptance.training.objective import Objective

OURS, NEOX, RWKV = "receptance", "transformers GPT-NeoX", "transformers RWKV"
OURS_4, RWKV_7 = "receptance RWKV-4", "rwkv7-hf"
SIZES = published("169m")
SHAPES = {4: ("169M", SIZES), 7: ("0.1B", published("rwkv7-0.1b"))}
PEERS = {4: (NEOX, RWKV), 7: (RWKV_7, OURS_4)}

Step = Callable[[Tensor], None]


def main() -> None:
    """Check, time, report; or be one of the processes that are timed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--times", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--version", type=int, default=4, choices=SHAPES, help="of RWKV (4)")
    parser.add_argument("--peers", nargs="*", help="default: all of the version")
    parser.add_argument("--long", type=int, default=8192, help="T against 512, last; 0 for none")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each")
    parser.add_argument("--recompute", action="store_true", help="ours: blocks are computed twice")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    if options.peers is None:
        options.peers = list(PEERS[options.version])
    if strangers := set(options.peers) - set(PEERS[options.version]):
        parser.error(
            f"--peers: {', '.join(strangers)}; there are {', '.join(PEERS[options.version])}"
        )
    check(options)
    again = ", recompute" if options.recompute else ""
    shape, sizes = SHAPES[options.version]
    shape += f" ({sizes.num_layers} x {sizes.width}, V {sizes.vocab_size})"
    results: dict[str, object] = {"shape": f"{shape} {options.dtype}{again}"}
    best: dict[tuple[str, int], dict[str, float]] = {}
    for steps in options.times:
        for name in (OURS, *options.peers):
            found = [in_a_process(name, b, steps, options) for b in options.batches]
            best[name, steps] = max(found, key=lambda one: one["tokens/s"])
            results |= figures(f"T{steps} {name}", best[name, steps])
        for name in options.peers:
            mine, theirs = best[OURS, steps], best[name, steps]
            results[f"T{steps} {OURS} / {name}: tokens/s"] = mine["tokens/s"] / theirs["tokens/s"]
            same = in_a_process(OURS, int(theirs["batch"]), steps, options)
            results[f"T{steps} {OURS} / {name}: memory at B{theirs['batch']}"] = (
                same["peak GB"] / theirs["peak GB"]
            )
    if options.long:
        long = in_a_process(OURS, 1, options.long, options)
        short = in_a_process(OURS, options.long // 512, 512, options)
        results |= figures(f"T{options.long} {OURS}", long)
        results[f"T{options.long} / T512, as many tokens"] = long["tokens/s"] / short["tokens/s"]
    report(results)


def figures(title: str, found: dict[str, float]) -> dict[str, float]:
    """The lines of one measurement."""
    return {f"{title}: {name}": value for name, value in found.items()}


def in_a_process(
    name: str, batch: int, steps: int, options: argparse.Namespace
) -> dict[str, float]:
    """What `measure` finds in a new process."""
    command = [sys.executable, __file__, "--one", name, "--dtype", options.dtype]
    command += ["--batches", str(batch), "--times", str(steps), "--steps", str(options.steps)]
    command += ["--version", str(options.version), *["--recompute"] * options.recompute]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} B{batch} T{steps}: {found}", flush=True)
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Speed, peak memory, and the share of what matrix products alone would reach."""
    batch, length, dtype = options.batches[0], options.times[0], getattr(torch, options.dtype)
    torch.manual_seed(0)
    sizes = sizes_of(name, options.version)
    tokens = torch.randint(1, sizes.vocab_size, (batch, length + 1))
    step = make_step(name, sizes, dtype, options.recompute)
    step(tokens[:, :9])  # once, short: the optimizer's memory
    seconds, rates = [], []
    for _ in range(options.steps):
        rates.append(matmul_rate(dtype))
        began = time.perf_counter()
        step(tokens)
        seconds.append(time.perf_counter() - began)
    rates.append(matmul_rate(dtype))
    speed = batch * length / min(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    share = speed * sizes.training_flops_per_token / max(rates)
    return {
        "batch": batch,
        "tokens/s": speed,
        "peak GB": peak,
        f"share of the {options.dtype} matmul rate": share,
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the products that a step is made of, at best, measured for half a second."""
    left, right = torch.randn(512, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        left @ right.T
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 768 * 3072 / best


def sizes_of(name: str, version: int) -> ModelConfig:
    """The sizes of a candidate's model."""
    sizes = SHAPES[version][1]
    return dataclasses.replace(SIZES, vocab_size=sizes.vocab_size) if name == OURS_4 else sizes


def make_step(name: str, sizes: ModelConfig, dtype: torch.dtype, recompute: bool) -> Step:
    """A training step of a candidate with its own model and optimizer."""
    if name in (OURS, OURS_4):
        return our_step(Model(sizes).train(), dtype, recompute)
    return their_step(gpt_neox(sizes) if name == NEOX else same_weights(Model(sizes)), dtype)


def same_weights(model: Model) -> nn.Module:
    """The peer of a model's version, with its weights."""
    return rwkv7_hf(model) if model.config.version == 7 else transformers_rwkv(model, model.config)


def rwkv7_hf(model: Model) -> nn.Module:
    """The model of rwkv7-hf with our weights."""
    import rwkv7_hf as package

    fields = config_fields(model.config, torch.float32) | {"use_cache": False}
    peer: nn.Module = package.RWKV7ForCausalLM(package.RWKV7Config(**fields))
    unused = model.config.architecture.unused(model.config)
    weights = {to_hf(n, 7): x for n, x in model.state_dict().items() if n not in unused}
    turned = {n: x.T if is_transposed(n) else x for n, x in weights.items()}
    shapes = {n: x.shape for n, x in peer.state_dict().items()}
    peer.load_state_dict({n: x.reshape(shapes[n]).clone() for n, x in turned.items()})
    return peer.train()


def transformers_rwkv(model: Model, sizes: ModelConfig = SIZES) -> RwkvForCausalLM:
    """Their model with our weights."""
    config = RwkvConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        rescale_every=0,
    )
    peer = RwkvForCausalLM(config)
    peer.load_state_dict({to_hf(name): x for name, x in model.state_dict().items()})
    return peer.train()


def gpt_neox(sizes: ModelConfig = SIZES) -> GPTNeoXForCausalLM:
    """A Pythia of the same width, depth and vocabulary, with heads of 64."""
    config = GPTNeoXConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.width // 64,
        intermediate_size=4 * sizes.width,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config).train()


@torch.no_grad()
def check(options: argparse.Namespace) -> None:
    """The same loss from the same weights, or no timing."""
    sizes = SHAPES[options.version][1]
    if {RWKV, RWKV_7}.isdisjoint(options.peers):
        return
    torch.manual_seed(0)
    # Of these, rwkv7-hf takes token 0 for padding.
    model, tokens = Model(sizes), torch.randint(1, sizes.vocab_size, (2, 65))
    features, _ = model.features(tokens[:, :-1])
    _, ours = head_loss(features, model.head.weight, tokens[:, 1:])
    theirs = same_weights(model)(tokens, labels=tokens).loss
    if abs(float(ours - theirs)) > 1e-4:
        raise SystemExit(f"losses differ: {float(ours)} and {float(theirs)}")


def our_step(model: Model, dtype: torch.dtype, recompute: bool = False) -> Step:
    """A step as training.Trainer makes it."""
    model.recompute = recompute
    name = str(dtype).removeprefix("torch.")
    options = TrainOptions(learning_rate=1e-5, dtype=name)
    objective = Objective(model, options)
    optimizer = make_optimizer(model.named_parameters(), model.learning_rate_scales(), options)

    def run(tokens: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        batch = Batch(tokens[:, :-1], tokens[:, 1:])
        value, _, _ = objective(batch, None, batch.learned)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def their_step(model: nn.Module, dtype: torch.dtype) -> Step:
    """The same with a transformers model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run(tokens: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
