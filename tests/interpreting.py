"""Triton's kernels in its interpreter, which runs them in numpy, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

# Triton's own functions that our kernels call.
CALLED = ("cdiv", "cumsum", "sum", "zeros", "_sum_combine")


def interpret_triton() -> None:
    """Make them run in numpy, whoever imported Triton before: that is when it decides."""
    import triton.language as tl
    from triton import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    # When it is imported, it wants all of Triton's functions to be of one kind.
    importlib.import_module("triton.experimental.gluon")
    for name in CALLED:
        function = getattr(tl.standard, name)
        if isinstance(function, JITFunction):
            for module in (tl, tl.standard):
                setattr(module, name, InterpretedFunction(function.fn))


def interpreted(*names: str) -> list[ModuleType]:
    """Modules of kernels, to be run in numpy on CPU tensors, whoever imported Triton before."""
    triton = importlib.import_module("triton")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    interpret_triton()

    class Quick(interpreter.InterpretedFunction):
        """Calls from inside a kernel, for which Triton would once more patch its whole language."""

        def __call__(self, *args, **kwargs):
            return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        modules = [importlib.import_module(f"receptance.ops.{name}") for name in names]
    functions = [x for module in modules for x in vars(module).values()]
    assert not any(isinstance(x, triton.JITFunction) for x in functions), "made for a GPU before"
    for function in functions:
        if type(function) is interpreter.InterpretedFunction:
            function.__class__ = Quick
    return modules


@contextlib.contextmanager
def rounding_like_a_gpu() -> Iterator[None]:
    """Triton's interpreter cuts off what does not fit into bfloat16."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl, builder = interpreter.tl, interpreter.InterpreterBuilder
    cut = builder.cast_impl

    def rounded(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cut(self, source, to)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", rounded)
        yield


@contextlib.contextmanager
def products_like_a_gpu() -> Iterator[None]:
    """Three products of tensor cores for one of float32; the interpreter knows no such thing."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    exact = builder.create_dot

    def short(x):
        """The nearest number of 11 significant bits."""
        bits = x.astype(np.float32).view(np.uint32) + np.uint32(0x1000)
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)

    def dot(self, a, b, d, precision, *others):
        (high_a, low_a), (high_b, low_b) = (
            (type(x)(part, x.dtype) for part in (short(x.data), short(x.data - short(x.data))))
            for x in (a, b)
        )
        for x, y in ((high_a, low_b), (low_a, high_b), (high_a, high_b)):
            d = exact(self, x, y, d, precision, *others)
        return d

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", dot)
        yield


COMPILE = r"""
import importlib
import json
import re
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from receptance.ops.triton_launching import STAGES

NARROW = "receptance key value removal replacement out grad_out".split()
NARROW += [f"grad_{name}" for name in NARROW]
module, name, half, given = sys.argv[1:4] + [json.loads(sys.argv[4])]
kernel = getattr(importlib.import_module(f"receptance.ops.{module}_kernels"), name)
launcher = importlib.import_module(f"receptance.ops.{module}")
constants = {"H": 12, "N": 64, "PART": 64, "CHUNK": launcher.CHUNK} | given
constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
signature = {n: "*" + (half if n in NARROW else "fp32") for n in kernel.arg_names}
signature |= {n: t for n, t in {"T": "i32", "resets": "*u8"}.items() if n in kernel.arg_names}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(kernel, signature=signature, constexprs=constants)
options = {"num_warps": launcher.WARPS[name], "num_stages": STAGES, "enable_fp_fusion": True}
done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert not re.search(r"\b(atom|red)\.", done.asm["ptx"])
open("kernel.cubin", "wb").write(done.asm["cubin"])
tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"]
used = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
print(used.partition(" STACK:")[2].partition(" ")[0])
"""


def compiled_stack(
    module: str, name: str, half: str, options: dict[str, object], folder: Path
) -> int:
    """The bytes of stack of a kernel that is compiled for sm_90; they hold what registers do not.

    Types of vectors are `half`, and those of everything else float32.
    """
    return int(run_compiler(COMPILE, folder, module, name, half, json.dumps(options)))


def run_compiler(code: str, folder: Path, *words: str) -> str:
    """What code prints that calls Triton's compiler, in a process that never interprets.

    The compiler is stricter than the interpreter, and needs no GPU.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
