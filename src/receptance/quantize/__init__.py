"""Weights as small integers.

The modules, in reading order:

    codes        the formats int8 and int4, and what their codes stand for
    rounding     a matrix to codes; the search for int4's scales and minimums
    feedback     the same with the errors of one input made up for by the next ones
    calibration  what a model's matrices are multiplied with on a text
    weights      all tensors of a model
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
