"""What the tests themselves keep to: chance that anybody can repeat."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# conftest.py seeds the global generators around every test.
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path != TESTS / "conftest.py"]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda x: str(x.relative_to(TESTS)))

SEEDS = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
}
# These draw from the global generator of torch unless they are given another.
DRAWS = {
    f"torch.{name}"
    for name in (
        *("bernoulli", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm"),
        *("rand_like", "randint_like", "randn_like"),
    )
}
METHODS = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_"}
METHODS |= {"random_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "orthogonal_"}
METHODS |= {"trunc_normal_", "xavier_normal_", "xavier_uniform_"}
# What random and numpy.random have beside functions that draw.
MAKERS = {"Random", "SystemRandom", "default_rng", "Generator", "SeedSequence", "PCG64"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` as text, and anything else as nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call of a dotted name, with the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def global_seeds(tree: ast.Module) -> Iterator[str]:
    """Where the tree seeds a global generator, except inside `with torch.random.fork_rng()`."""
    forks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any("torch.random.fork_rng" in map(dotted, ast.walk(x)) for x in node.items)
    ]
    inside = {id(node) for fork in forks for node in ast.walk(fork)}
    for node, name in calls(tree):
        if name in SEEDS and id(node) not in inside:
            yield f"line {node.lineno}: {name}"


def global_draws(tree: ast.Module) -> Iterator[str]:
    """Where the tree draws from a global generator."""
    for node, name in calls(tree):
        room, _, function = name.rpartition(".")
        torchs = name in DRAWS or function in METHODS
        others = room in ("random", "np.random", "numpy.random") and function not in MAKERS
        given = any(keyword.arg == "generator" for keyword in node.keywords)
        if (torchs and not given) or (others and name not in SEEDS):
            yield f"line {node.lineno}: {name}"


@every_file
def test_global_generators_are_seeded_only_inside_a_fork(path):
    assert list(global_seeds(ast.parse(path.read_text(encoding="utf-8")))) == []


@every_file
def test_every_draw_names_its_generator(path):
    assert list(global_draws(ast.parse(path.read_text(encoding="utf-8")))) == []


SOURCE = """
torch.manual_seed(1)
with torch.random.fork_rng():
    torch.manual_seed(2)
torch.rand(3)
torch.rand(3, generator=generator)
x.normal_()
torch.nn.init.normal_(x, generator=generator)
random.shuffle(x)
random.Random(1).shuffle(x)
np.random.rand(3)
np.random.default_rng(0).random()
"""


def test_the_rules_find_what_they_are_for():
    tree = ast.parse(SOURCE)
    assert list(global_seeds(tree)) == ["line 2: torch.manual_seed"]
    found = [f"line {n}: {x}" for n, x in ((5, "torch.rand"), (7, "x.normal_"))]
    found += ["line 9: random.shuffle", "line 11: np.random.rand"]
    assert sorted(global_draws(tree)) == sorted(found)
