"""No code and no test draws from a global random generator: every draw names its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import receptance

ROOTS = [Path(receptance.__file__).parent, Path(__file__).parent]
FILES = [path for root in ROOTS for path in sorted(root.rglob("*.py"))]

# Functions of torch that take a generator, methods of its tensors, and functions without one.
DRAWS = {"bernoulli", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm"}
METHODS = ("bernoulli_", "cauchy_", "exponential_", "geometric_", "normal_", "random_", "uniform_")
WITHOUT = {"rand_like", "randint_like", "randn_like"}
# What the modules random and numpy.random have that draws nothing from a global generator.
OWN = {"Generator", "Random", "SeedSequence", "SystemRandom", "default_rng"}
# Where torch seeds its global generators: one for each kind of device.
SEEDED = {"torch", "torch.random", "torch.cuda", "torch.mps", "torch.xpu"}
SEEDING = {"manual_seed", "manual_seed_all", "seed", "seed_all"}
# conftest.py seeds the global generators before each test and restores them afterwards.
SEEDS = "conftest.py"


def bare_draws(code: str) -> Iterator[str]:
    """Each call in the code that draws from a global generator or seeds one, with its line."""
    tree = ast.parse(code)
    forked = {
        id(inside)
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and "fork_rng" in ast.unparse(block.items[0])
        for inside in ast.walk(block)
    }
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            owner, name = ast.unparse(call.func.value), call.func.attr
            generator = any(keyword.arg == "generator" for keyword in call.keywords)
            bare = (
                (owner == "torch" and name in DRAWS and not generator)
                or (owner == "torch" and name in WITHOUT)
                or (name.endswith(METHODS) and not generator)
                or (owner.endswith("init") and name == "orthogonal_" and not generator)
                or (owner in ("random", "np.random", "numpy.random") and name not in OWN)
                or (owner in SEEDED and name in SEEDING and id(call) not in forked)
            )
            if bare:
                yield f"{call.lineno}: {ast.unparse(call)}"


def test_every_draw_names_its_generator():
    bare = {
        path: list(bare_draws(path.read_text(encoding="utf-8")))
        for path in FILES
        if path.name != SEEDS
    }
    assert {path.name: found for path, found in bare.items() if found} == {}


@pytest.mark.parametrize(
    "code",
    [
        "torch.randn(3)",
        "torch.randn_like(x)",
        "x.normal_()",
        "nn.init.xavier_uniform_(x)",
        "nn.init.orthogonal_(x)",
        "torch.manual_seed(0)",
        "torch.random.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "np.random.rand(3)",
        "random.choice(x)",
    ],
)
def test_a_bare_draw_is_found(code):
    assert list(bare_draws(f"\n{code}")) == [f"2: {code}"]


@pytest.mark.parametrize(
    "code",
    [
        "torch.randn(3, generator=g)",
        "x.normal_(generator=g)",
        "torch.Generator().manual_seed(0)",
        "np.random.default_rng(0).normal()",
        "random.Random(0).choice(x)",
        "with torch.random.fork_rng():\n    torch.manual_seed(0)",
    ],
)
def test_a_draw_with_a_generator_is_not(code):
    assert list(bare_draws(code)) == []
