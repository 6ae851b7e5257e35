"""A GPU for these tests: Triton's interpreter on a machine without one."""

import copy
import importlib.util

import pytest
import torch
from interpreting import interpret_triton
from torch import Tensor

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.quantize import Quantized, quantize
from receptance.quantize.packing import FLOATS

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes with torch for CUDA", allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


with pytest.MonkeyPatch.context() as patch:
    if not ON_GPU:
        patch.setenv("TRITON_INTERPRET", "1")
        interpret_triton()
    from receptance.engine.gpu import GpuEngine, Run, gpu_engine
    from receptance.ops.triton_products import Tiles

KINDS = ["float32", "bfloat16", "float16", "int8", "int4"]
every_kind = pytest.mark.parametrize("kind", KINDS)

# What products of few rows and of many round their inputs to, as a share of large logits. One row
# is multiplied in float32.
ROUNDING = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 2e-2, "int4": 2e-2}
EXACT = 2e-5
# The interpreter is quickest with few programs, and torch is quicker.
LARGE = Tiles(rows=8, dot_rows=128)
TORCH = Tiles(rows=8, dot_rows=128, most_floats=1, most_codes=1)


def fake_graph(run: Run) -> Run:
    """As a recording: the step is run before it counts."""
    run()
    return run


def engine_of(model: Model, kind: str, *, tiles: Tiles = LARGE, **options: object) -> GpuEngine:
    graphs = {} if ON_GPU else {"capture": fake_graph}
    tensors = dict(model.state_dict())
    return gpu_engine(
        model.config, tensors, kind, device=DEVICE, tiles=tiles, **{**graphs, **options}
    )


def narrow(weight: Tensor, kind: str, group: int | None = None) -> Tensor | Quantized:
    """A matrix as an engine stores it."""
    return weight.to(FLOATS[kind]) if kind in FLOATS else quantize(weight, kind, group)


def widened(matrix: Tensor | Quantized) -> Tensor:
    return matrix.dequantize() if isinstance(matrix, Quantized) else matrix.float()


def rounded(model: Model, kind: str) -> Model:
    """A float32 model with the weights that the engine has."""
    model = copy.deepcopy(model)
    for name in model.config.architecture.layouts(model.config):
        weight = model.get_parameter(name)
        weight.data = widened(narrow(weight.detach(), kind))
    return model


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def assert_near(found: Tensor, wanted: Tensor, limit: float) -> None:
    """Relative to the largest number wanted, or to 1."""
    found, wanted = found.cpu().float(), wanted.cpu().float()
    assert found.shape == wanted.shape
    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    assert error < limit, f"{error:.1e}"
