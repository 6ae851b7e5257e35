"""One training step of the 169M shape against transformers, in the same run.

    python benchmarks/train_step.py [--dtype bfloat16] [--batch 2 --time 512]

A step is forward, loss, backward, clipping and AdamW. The peers are transformers' RWKV with the
same weights and its GPT-NeoX (the architecture of Pythia) of the same width, depth and vocabulary,
both under autocast for bfloat16, where a step of theirs can take minutes. Checks first that RWKV's
loss is ours. JSON on the last line.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch
from _common import report, time_in_turns
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, RwkvConfig, RwkvForCausalLM

from receptance.config import ModelConfig, published
from receptance.formats.names import to_hf
from receptance.model import Model
from receptance.training import TrainOptions, head_loss, make_optimizer


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--time", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer", choices=["gpt-neox", "rwkv"], help="only this one")
    options = parser.parse_args()
    sizes, dtype = published("169m"), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(sizes.vocab_size, (options.batch, options.time + 1), generator=generator)
    model = Model(sizes).train()
    rwkv = transformers_rwkv(model, sizes)
    check(model, rwkv, tokens)
    peers: dict[str, Callable[[], nn.Module]] = {}
    if options.peer != "rwkv":
        peers["transformers GPT-NeoX"] = lambda: gpt_neox(sizes)
    if options.peer != "gpt-neox":
        peers["transformers RWKV"] = lambda: rwkv

    seconds = {}
    ours = our_step(model, dtype)
    for name, make in peers.items():  # in pairs: three models with optimizers need much memory
        theirs = their_step(make(), dtype)
        for run in (ours, theirs):  # once, short: memory, optimizer
            run(tokens[:, :9])
        pair = time_in_turns(
            {"receptance": lambda: ours(tokens), name: lambda run=theirs: run(tokens)},
            rounds=options.rounds,
            warmup=0,
        )
        seconds[name] = (pair["receptance"], pair[name])
        print(f"{name}: {pair[name]:.1f} s a step, receptance {pair['receptance']:.1f} s")
        gc.collect()
    count = options.batch * options.time
    results: dict[str, object] = {
        "shape": f"169M (12 x 768, V 50277), B{options.batch} T{options.time} {options.dtype}",
        "receptance: tokens/s": count / min(mine for mine, _ in seconds.values()),
    }
    for name, (mine, theirs) in seconds.items():
        results[f"{name}: tokens/s"] = count / theirs
        results[f"receptance / {name}"] = theirs / mine
    report(results)


def transformers_rwkv(model: Model, sizes: ModelConfig) -> RwkvForCausalLM:
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


def gpt_neox(sizes: ModelConfig) -> GPTNeoXForCausalLM:
    """A Pythia of the same width, depth and vocabulary, 12 heads."""
    config = GPTNeoXConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=12,
        intermediate_size=4 * sizes.width,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config).train()


@torch.no_grad()
def check(model: Model, peer: RwkvForCausalLM, tokens: Tensor) -> None:
    """The same loss from the same weights, or no timing."""
    short = tokens[:, :65]
    features, _ = model.features(short[:, :-1])
    ours = head_loss(features, model.head.weight, short[:, 1:])
    theirs = peer(short, labels=short).loss
    if abs(float(ours - theirs)) > 1e-4:
        raise SystemExit(f"losses differ: {float(ours)} and {float(theirs)}")


def our_step(model: Model, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """A step as training.Trainer makes it."""
    optimizer = make_optimizer(model, TrainOptions(learning_rate=1e-5))

    def run(tokens: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        features, _ = model.features(tokens[:, :-1], dtype=dtype)
        head_loss(features, model.head.weight, tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def their_step(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """The same with a transformers model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run(tokens: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
