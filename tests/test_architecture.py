"""The rules of CONTRIBUTING.md that a program can check, for whatever modules there are."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import receptance
from receptance.__main__ import APPS
from receptance.config import ModelConfig
from receptance.model.v4 import RWKV4
from receptance.model.v7 import RWKV7

ROOT = Path(receptance.__file__).parent
FILES = {
    ".".join(("receptance", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {
    name.removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for name, path in FILES.items()
}


def every_module(rule: Callable[[str], None]) -> Callable[[], None]:
    """One test of a rule for all modules: one for each would take longer to begin than to run."""

    def test() -> None:
        broken = []
        for module in sorted(TREES):
            try:
                rule(module)
            except AssertionError as error:
                broken.append(f"{module}: {error}")
        assert not broken, "\n".join(broken)

    test.__doc__ = rule.__doc__
    return test


# The rooms from the ground up: a module imports from its own room and from those before it.
# Modules in the root of the package are rooms of their own.
ROOMS = [
    *("version", "errors", "sealed", "atomic", "progress", "plots", "state", "tokenizer"),
    *("ops", "model", "config", "formats", "quantize", "storage", "data", "adapters"),
    *("engine", "inference", "conversion", "checking", "training"),
    *("evaluation", "analysis", "reproduce", "server", "apps", "__main__"),
]
# The package itself offers the public names of the rooms.
PUBLIC = "receptance"


def floor(module: str) -> int:
    """The place of a module's room in ROOMS."""
    return ROOMS.index(module.split(".")[1])


def imports(module: str) -> Iterator[str]:
    """Every module or name of a module that this one imports anywhere, absolutely named."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of this package among them."""
    found = set()
    for name in imports(module):
        if name.split(".")[0] == "receptance":
            while name not in TREES:
                name = name.rpartition(".")[0]
            found.add(name)
    return found


def is_app(module: str) -> bool:
    return module.startswith("receptance.apps.") or module == "receptance.__main__"


# ---- who imports whom ---------------------------------------------------------------------------


def test_there_is_something_to_check():
    assert len(TREES) > 20
    assert {"receptance.ops.wkv", "receptance.model.v4", "receptance.config"} <= TREES.keys()


def test_every_room_has_a_floor():
    assert {m.split(".")[1] for m in TREES if m != PUBLIC} <= set(ROOMS)


@every_module
def test_imports_go_one_way(module):
    if module == PUBLIC:
        return
    upward = {n for n in own_imports(module) - {PUBLIC} if floor(n) > floor(module)}
    assert not upward, f"{module} imports from a higher floor: {upward}"


def test_modules_import_in_no_circle():
    """Imports inside functions count: a deferred import hides a circle and does not break it."""
    below = {module: own_imports(module) - {PUBLIC, module} for module in TREES}
    # A package stands for what its __init__ imports; a module of it does not import that.
    below = {m: {n for n in names if not m.startswith(n + ".")} for m, names in below.items()}
    left = dict(below)
    while free := [m for m, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"modules that import each other: {sorted(left)}"


@every_module
def test_only_apps_import_the_package_as_a_whole(module):
    assert is_app(module) or PUBLIC not in own_imports(module), "a circle through __init__"


@every_module
def test_the_operator_knows_only_torch(module):
    if not module.startswith("receptance.ops"):
        return
    own = {name for name in own_imports(module) if not name.startswith("receptance.ops")}
    outside = {name.split(".")[0] for name in imports(module)} - {"receptance"}
    assert not own
    assert outside <= {"torch", "triton"} | sys.stdlib_module_names


@every_module
def test_apps_do_not_import_each_other(module):
    others = own_imports(module) & {f"receptance.apps.{name}" for name in APPS} - {module}
    assert not module.startswith("receptance.apps.") or not others


@every_module
def test_only_apps_know_the_command_line(module):
    names = {name.split(".")[0] for name in imports(module)}
    assert is_app(module) or not names & {"tyro", "argparse"}


@every_module
def test_only_apps_name_flags(module):
    """The library names arguments, as in dtype=; __main__ makes flags of them."""
    strings = (node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant))
    flags = [text for text in strings if isinstance(text, str) and re.search("--[a-z]", text)]
    assert is_app(module) or not flags, f"{module} names flags of the command line: {flags}"


def test_versions_of_the_model_do_not_import_each_other():
    versions = {m for m in TREES if m.split(".")[-1].strip("v").isdigit()}
    assert "receptance.model.v4" in versions
    for module in versions:
        assert not own_imports(module) & versions - {module}


# ---- a version is one room ----------------------------------------------------------------------

# Names of version 4 stand in its module, its operator and kernels, and the tables of names. What
# all versions have in common, such as the matrix with the feed-forward width, is in architecture.
# Later versions have some of the same names, and what these share is in headwise.
KNOW_VERSION_7 = (
    *("receptance.model.v", "receptance.model.headwise"),
    *("receptance.ops.", "receptance.formats.names"),
)
KNOW_VERSION_4 = (*KNOW_VERSION_7, "receptance.model.architecture")


def test_names_of_version_7_stand_in_its_room():
    """Those that it shares with version 4 are looked for there."""
    config = ModelConfig(version=7, vocab_size=1, width=1, num_layers=1)
    shared = RWKV4().block_shapes(ModelConfig(vocab_size=1, width=1, num_layers=1), 0)
    names = {*RWKV7().block_shapes(config, 0)} - {*shared} | {"value_by_key"}
    names |= {"k_k", "k_a", "r_k", "ln_x"}
    for module, path in FILES.items():
        if module.startswith(KNOW_VERSION_7) or module.startswith("receptance.native"):
            continue
        text = path.read_text(encoding="utf-8")
        found = {name for name in names if re.search(rf"\b{re.escape(name)}\b", text)}
        assert not found, f"{module} knows {found} of version 7"


def test_names_of_version_4_stand_in_its_room():
    version, config = RWKV4(), ModelConfig(vocab_size=1, width=1, num_layers=1)
    parameters = {name.removesuffix(".weight") for name in version.block_shapes(config, 0)}
    names = {*parameters, *(name.split(".")[-1] for name in parameters if "time_" in name)}
    names |= {"time_decay", "time_first", "time_mix_"} | {*version.state_fields} - {"exponent"}
    for module, path in FILES.items():
        if module.startswith(KNOW_VERSION_4) or module.startswith("receptance.native"):
            continue
        text = path.read_text(encoding="utf-8")
        found = {name for name in names if re.search(rf"\b{re.escape(name)}", text)}
        assert not found, f"{module} knows {found} of version 4"


# ---- importing does nothing ---------------------------------------------------------------------

WATCHER = """
import json, random, sys
import torch
before = set(sys.modules)
rng, python_rng = torch.get_rng_state(), random.getstate()
switches = lambda: [
    str(torch.get_default_dtype()), torch.get_num_threads(), torch.get_num_interop_threads(),
    torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
    torch.get_float32_matmul_precision(), sys.getrecursionlimit(), len(sys.warnoptions),
]
was = switches()
from receptance import *
print("\\n" + json.dumps({
    "new": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "switches": was == switches(),
    "random": bool(torch.equal(rng, torch.get_rng_state())) and python_rng == random.getstate(),
    "dynamo": "torch._dynamo" in sys.modules,
}))
"""
NOT_FOR_IMPORT = (
    "transformers tokenizers tyro rich matplotlib triton huggingface_hub datasets tensorboard "
    "wandb gguf lm_eval pandas scipy sympy pytest"
)


@pytest.fixture(scope="module")
def import_report() -> dict:
    """What importing receptance and all of its public names does in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCHER],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": str(ROOT.parent)},
    )
    printed, report = done.stdout.rsplit("\n", 2)[0], done.stdout.strip().rsplit("\n", 1)[-1]
    return json.loads(report) | {"printed": printed.strip() + done.stderr.strip()}


def test_import_prints_nothing(import_report):
    assert import_report["printed"] == ""


def test_import_brings_torch_alone(import_report):
    assert not set(import_report["new"]) & set(NOT_FOR_IMPORT.split())
    assert not import_report["dynamo"], "the compiler takes seconds to import"


def test_import_changes_no_global_switch(import_report):
    assert import_report["switches"]
    assert import_report["random"]


# ---- what library code does not do --------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    """`a.b.c` as text, and anything else as nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def mentions(module: str) -> set[str]:
    """Every dotted name and every imported name of a module."""
    return {dotted(node) for node in ast.walk(TREES[module])} | set(imports(module))


@every_module
def test_nothing_reads_the_environment(module):
    assert not mentions(module) & {"os.environ", "os.getenv", "os.environb", "os.putenv"}


@every_module
def test_the_library_has_no_global_effects(module):
    forbidden = {
        "torch.set_default_dtype",
        "torch.set_default_device",
        "warnings.simplefilter",
        "logging.basicConfig",
    }
    if not is_app(module):
        forbidden |= {"sys.exit", "os._exit", "exit", "quit", "SystemExit", "print"}
        forbidden |= {"torch.set_num_threads", "torch.set_float32_matmul_precision"}
    assert not mentions(module) & forbidden


GLOBAL_SEEDS = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.seed",
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
}


@every_module
def test_global_generators_are_seeded_only_inside_a_fork(module):
    def seeds(tree: ast.AST) -> int:
        return sum(dotted(node) in GLOBAL_SEEDS for node in ast.walk(tree))

    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    forks = [f for f in functions if "torch.random.fork_rng" in map(dotted, ast.walk(f))]
    assert seeds(TREES[module]) <= sum(map(seeds, forks))


@every_module
def test_no_except_without_a_name(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ExceptHandler):
            caught = dotted(node.type) if node.type else ""
            where = f"{module}:{node.lineno}"
            assert node.type is not None, f"{where}: except of everything"
            assert caught != "BaseException" or any(
                isinstance(inner, ast.Raise) for inner in ast.walk(node)
            ), f"{where}: swallows interrupts"


# ---- readable -----------------------------------------------------------------------------------


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes without an underscore, and the methods of these classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_"):
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


@every_module
def test_docstrings(module):
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    found = list(public(tree.body))
    said = {node.name for node in found if ast.get_docstring(node)}
    # A method that overrides another has its docstring.
    without = {node.name for node in found} - said
    assert not without, f"{module}: no docstring on {without}"


# Kernels are as long as their mathematics.
LONGEST, LONGEST_KERNEL = 350, 450


def test_files_fit_in_the_head():
    lines = {name: len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in FILES}
    longest = {n: LONGEST_KERNEL if n.startswith("receptance.ops.") else LONGEST for n in FILES}
    assert {name: count for name, count in lines.items() if count > longest[name]} == {}
