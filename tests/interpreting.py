"""Triton's kernels in its interpreter, which runs them in numpy, on a machine without a GPU."""

import importlib

# Triton's own functions that our kernels call.
CALLED = ("cdiv", "sum", "zeros", "_sum_combine")


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
