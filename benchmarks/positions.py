"""What one more token costs behind a text of a length: RWKV's state against a key-value cache.

    python benchmarks/positions.py measure [--lengths 0 1024 ...] [--json results/positions.json]
    python benchmarks/positions.py draw [--json results/positions.json] [--out docs/images]

Both models have random weights, 12 layers of 768, a vocabulary of 50,277 and float32: RWKV-4 on the
native kernels of `receptance`, which reads the text before it is timed, and GPT-NeoX of
transformers, whose cache is filled with random keys and values, which take the same time as any.
Both are first checked against their own parallel form, and measured in turns. `draw` makes the
picture of the README from the JSON, for light and for dark pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import rounded
from rich.progress import track
from torch import Tensor

import receptance
from receptance.config import PUBLISHED_SIZES
from receptance.engine import load_engine
from receptance.engine.base import Engine
from receptance.inference.generation import prefill
from receptance.inference.measure import machine, random_tensors, seconds
from receptance.state import State

SIZES = PUBLISHED_SIZES["169m"]
HEADS = 12
LENGTHS = (0, 1024, 2048, 4096, 6144, 8192, 12288, 16384)
TIMED = 15  # tokens at each length, of which the median counts
OURS, THEIRS = "RWKV-4, receptance", "GPT-NeoX, transformers with its KV cache"
COLORS = {OURS: "#d95f02", THEIRS: "#4477aa"}


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "draw"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path, default=Path("results/positions.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    if options.what == "draw":
        draw(json.loads(options.json.read_text()), options.out)
        return
    found = measure(sorted(options.lengths))
    options.json.write_text(json.dumps(rounded(found), indent=1) + "\n")
    print(json.dumps(rounded(found)))


# ---- measuring ----------------------------------------------------------------------------------


def measure(lengths: list[int]) -> dict[str, Any]:
    """Milliseconds for one more token, and bytes kept, at each length, of both."""
    engine, theirs = our_engine(), neox()
    check(engine, theirs)
    figures: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    state, read = None, 0
    for length in track(lengths, description="measuring"):
        if length > read:
            _, state = prefill(engine, [text(length)[read:].tolist()], state)
            read = length
        ours, cached = Ours(engine, state), Theirs(theirs, length)
        times = [(seconds(ours.step), seconds(cached.step)) for _ in range(TIMED + 2)][2:]
        for name, place, one in ((OURS, 0, ours), (THEIRS, 1, cached)):
            own = sorted(1e3 * pair[place] for pair in times)
            figures[name].append(
                {
                    "length": length,
                    "ms/token": statistics.median(own),
                    "quartiles": [own[len(own) // 4], own[-1 - len(own) // 4]],
                    "bytes kept": one.bytes_kept(),
                }
            )
    return {
        "what": "one more token behind a text of a length, batch 1, float32, 12 layers of 768",
        "machine": machine(),
        "versions": versions(),
        "figures": figures,
    }


class Ours:
    """The state behind a text, and one more token."""

    def __init__(self, engine: Engine, state: State | None) -> None:
        self.engine, self.state = engine, state

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits [V] behind one more token; the state moves on."""
        logits, self.state = self.engine(torch.tensor([[1]]), self.state)
        return logits[0, -1]

    def bytes_kept(self) -> int:
        """The size of the state."""
        assert self.state is not None
        return self.state.nbytes


class Theirs:
    """A cache of a length, and one more token."""

    def __init__(self, model: Any, length: int) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache()
        generator = torch.Generator().manual_seed(length)
        shape = (1, HEADS, length, SIZES.width // HEADS)
        for layer in range(SIZES.num_layers if length else 0):
            keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
            self.cache.update(keys, values, layer)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits [V] behind one more token; the cache grows."""
        out = self.model(torch.tensor([[1]]), past_key_values=self.cache, use_cache=True)
        return out.logits[0, -1]

    def bytes_kept(self) -> int:
        """The size of the cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def our_engine() -> Engine:
    """The native engine, of a file of random weights."""
    import tempfile

    from safetensors.torch import save_file

    from receptance.inference.measure import NumberedTokens

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.safetensors")
        save_file(random_tensors(SIZES), path)
        engine, _ = load_engine(path, tokenizer=NumberedTokens(SIZES.vocab_size), backend="native")
    return engine


def neox() -> Any:
    """GPT-NeoX of the same width, depth and vocabulary."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=SIZES.vocab_size,
            hidden_size=SIZES.width,
            num_hidden_layers=SIZES.num_layers,
            num_attention_heads=HEADS,
            intermediate_size=4 * SIZES.width,
            max_position_embeddings=1 << 16,
        )
        return GPTNeoXForCausalLM(config).eval()


@torch.no_grad()
def check(engine: Engine, theirs: Any) -> None:
    """Token by token both give the logits of their parallel form."""
    tokens = torch.ones(1, 9, dtype=torch.long)
    ours, cached = Ours(engine, None), Theirs(theirs, 0)
    forms: list[tuple[Callable[[], Tensor], Tensor]] = [
        (ours.step, engine(tokens)[0][0]),
        (cached.step, theirs(tokens).logits[0]),
    ]
    for step, whole in forms:
        torch.testing.assert_close(torch.stack([step() for _ in whole]), whole, atol=1e-3, rtol=0)


def text(length: int) -> Tensor:
    """Token ids [length]."""
    return torch.randint(SIZES.vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def versions() -> dict[str, str]:
    """What was measured."""
    import transformers

    return {
        "receptance": receptance.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---- drawing ------------------------------------------------------------------------------------


def draw(found: dict[str, Any], folder: Path) -> None:
    """positions-light.svg and positions-dark.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for shade, ink in (("light", "#1f2328"), ("dark", "#e6edf3")):
        draw_one(found, folder / f"positions-{shade}.svg", ink)


def draw_one(found: dict[str, Any], path: Path, ink: str) -> None:
    """Time and memory of one more token against the length of the text before it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    fixed = {"svg.hashsalt": "positions", "svg.fonttype": "path", "axes.edgecolor": ink}
    with mpl.rc_context(style | fixed | {"font.size": 11}):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for name, rows in found["figures"].items():
            lengths = [row["length"] / 1000 for row in rows]
            low, high = zip(*(row["quartiles"] for row in rows), strict=True)
            time.plot(lengths, [row["ms/token"] for row in rows], "o-", ms=4, color=COLORS[name])
            time.fill_between(lengths, low, high, alpha=0.25, color=COLORS[name], linewidth=0)
            kept = [row["bytes kept"] / 1e6 for row in rows]
            memory.plot(lengths, kept, "o-", ms=4, color=COLORS[name], label=name)
        time.set_ylabel("milliseconds for one more token")
        memory.set_ylabel("megabytes kept for the text")
        for axes in (time, memory):
            axes.set_xlabel("tokens read before, thousands")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 10]))
            axes.spines[["top", "right"]].set_visible(False)
            axes.patch.set_alpha(0)
        figure.legend(
            title="169M parameters, float32, on two CPU cores",
            loc="outside upper center",
            ncols=2,
            frameon=False,
            labelcolor=ink,
        )
        figure.patch.set_alpha(0)
        figure.savefig(path, format="svg", metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main()
