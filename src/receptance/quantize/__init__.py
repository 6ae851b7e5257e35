"""Weights as small integers.

The modules, in reading order:

    codes        the formats int8 and int4, and the weights that their codes stand for
    rounding     rounding a matrix to codes, and the search for int4's scales and minimums
    feedback     rounding that makes up for the error of an input with the inputs after it
    calibration  the inputs that a model's matrices have on a text
    weights      quantizing all tensors of a model
    packing      the layouts of weights in memory that the kernels read
"""

from receptance.quantize.codes import (
    Quantized,
    QuantizedKind,
    ceil_div,
    check_group,
    relative_error,
)
from receptance.quantize.feedback import quantize_with_feedback
from receptance.quantize.rounding import quantize

__all__ = [
    "Quantized",
    "QuantizedKind",
    "ceil_div",
    "check_group",
    "quantize",
    "quantize_with_feedback",
    "relative_error",
]
