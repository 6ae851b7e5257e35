"""Sums of products of integers at the limits of what the native kernels add them up in."""

import pytest
import torch

from receptance.config import ModelConfig
from receptance.engine import NativeEngine
from receptance.formats.names import tensor_shapes
from receptance.ops import native
from receptance.quantize.codes import GROUPS, Quantized
from receptance.quantize.packing import pack

pytestmark = pytest.mark.skipif(not native.is_available(), reason="kernels not built")

WIDTH, OUTPUTS = 256, 48


def activations() -> torch.Tensor:
    """Rows [5,WIDTH] whose 16-bit codes have the extreme bytes: 127 and 255, -128, 0 and -1."""
    codes = torch.tensor([32767.0, -32767.0, 255.0, -1.0])
    mixed = codes[torch.arange(WIDTH) % 4]
    rows = [codes[i].expand(WIDTH).clone() for i in range(4)]
    for row in rows[2:]:
        row[::128] = 32767.0  # sets the scale of its block to 1
    return torch.stack([*rows, mixed]) / 32768


@pytest.mark.parametrize("group", GROUPS["int4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_the_largest_codes_and_activations_add_up_exactly(instruction_set, rows, group):
    codes = torch.full((OUTPUTS, WIDTH), 15, dtype=torch.uint8)
    codes[1::3], codes[2::3, ::2] = 0, 0
    groups = (OUTPUTS, WIDTH // group)
    scale, minimum = torch.ones(groups), torch.full(groups, -8.0)
    head = Quantized("int4", group, codes, scale.bfloat16(), minimum.bfloat16())
    config = ModelConfig(vocab_size=OUTPUTS, width=WIDTH, num_layers=1)
    layouts = config.architecture.layouts(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in tensor_shapes(config).items()
    }
    matrices = {
        name: pack(head if name == "head.weight" else tensors[name], layout)
        for name, layout in layouts.items()
    }
    vectors = {name: x for name, x in tensors.items() if name not in layouts}
    engine = NativeEngine(config, matrices, vectors, "", instruction_set=instruction_set)
    x = activations()[-rows:]
    wanted = x.double() @ head.dequantize().double().T
    found = engine.head(x)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
