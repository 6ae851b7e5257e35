"""What the tests keep to: no clock, nothing that outlives a test, and something asserted.

Random draws have test_draws.py to themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
TREES = {
    path.relative_to(TESTS).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in FILES
}

CLOCKS = {
    f"time.{name}{unit}"
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time")
    for unit in ("", "_ns")
}
CLOCKS |= {"time.sleep", "datetime.now", "datetime.datetime.now", "datetime.utcnow"}
MAY_LOOK = {
    "formats/hostile_files.py": {"time.process_time"},  # bounds what a hostile file may cost
    "test_main.py": {"time.sleep"},  # interrupts an import at some moments of many
    "apps/test_serve.py": {"time.sleep"},  # asks a process of its own until it answers
    "server/test_client_errors.py": {"time.sleep"},  # makes the model slow
}

LASTING = {"os.chdir", "os.putenv", "os.unsetenv", "os.umask"}
LASTING |= {f"os.environ.{name}" for name in ("clear", "pop", "popitem", "setdefault", "update")}
# Processes of their own, started by tests.
PROGRAMS = {"training/two_ranks.py"}

# What fails by itself, besides functions whose names begin with "assert_": those of libraries,
# our own, and exec, because code in the documentation asserts what it says.
ASSERTING = {"raises", "warns", "opcheck", "gradcheck", "refusal", "refuse", "refused", "close"}
ASSERTING |= {"check", "exec", "outcome"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` as text, and anything else as nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def clocks(tree: ast.AST) -> set[str]:
    """The clocks that are looked at, and the ways to wait for one."""
    return {dotted(call.func) for call in ast.walk(tree) if isinstance(call, ast.Call)} & CLOCKS


def lasting(tree: ast.AST) -> Iterator[str]:
    """Where the process is changed for all tests that follow; monkeypatch puts such things back."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in LASTING:
            yield f"line {node.lineno}: {dotted(node.func)}"
        changed = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
        if changed and dotted(node.value) == "os.environ":
            yield f"line {node.lineno}: os.environ[...]"


def vacuous(tree: ast.AST) -> Iterator[str]:
    """The tests that neither assert anything nor call anything that does."""
    for test in ast.walk(tree):
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
            inside = list(ast.walk(test))
            calls = {ast.unparse(x.func).split(".")[-1] for x in inside if isinstance(x, ast.Call)}
            helped = calls & ASSERTING or any(name.startswith("assert_") for name in calls)
            if not helped and not any(isinstance(x, ast.Assert) for x in inside):
                yield test.name


def test_names_of_files_are_unique():
    """Pytest imports a test file by its name alone."""
    names = [path.name for path in FILES if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_clock_decides():
    looked = {name: clocks(tree) - MAY_LOOK.get(name, set()) for name, tree in TREES.items()}
    assert {name: found for name, found in looked.items() if found} == {}


def test_nothing_outlives_a_test():
    left = {name: list(lasting(tree)) for name, tree in TREES.items() if name not in PROGRAMS}
    assert {name: found for name, found in left.items() if found} == {}


def test_every_test_asserts_something():
    empty = {name: list(vacuous(tree)) for name, tree in TREES.items()}
    assert {name: found for name, found in empty.items() if found} == {}


SOURCE = """
def test_of_nothing(clock):
    os.chdir("elsewhere")
    os.environ["A"] = "b"
    began = time.monotonic()
    clock.sleep(1)
    print(os.environ["A"], os.environ.get("A"))

def test_by_a_helper():
    torch.testing.assert_close(1, 2)
    refusal()

def test_that_asserts():
    assert time.process_time() < 1
"""


def test_the_rules_find_what_they_are_for():
    tree = ast.parse(SOURCE)
    assert clocks(tree) == {"time.monotonic", "time.process_time"}
    assert list(lasting(tree)) == ["line 3: os.chdir", "line 4: os.environ[...]"]
    assert list(vacuous(tree)) == ["test_of_nothing"]
