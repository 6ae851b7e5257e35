"""The parts that all versions share, one by one."""

import pytest
import torch

from receptance.model.parts import (
    _WIDE_ROWS,
    _cpu_multiplies_bfloat16,
    _WideProduct,
    squared_relu,
)


@pytest.mark.parametrize(
    ("capability", "amx", "avx512_bf16", "name", "fast"),
    [
        ("DEFAULT", False, False, "Intel Celeron", False),
        ("AVX2", False, False, "AMD EPYC", False),
        ("AVX512", False, False, "Intel Xeon", False),
        ("AVX512", False, True, "Intel Xeon", False),
        ("AVX512", True, True, "Intel Xeon", True),
        ("AVX512", False, True, "AMD EPYC", True),
        ("SVE256", False, False, "ARM Neoverse V1", True),
    ],
)
def test_where_bfloat16_is_multiplied_fast(monkeypatch, capability, amx, avx512_bf16, name, fast):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    found = {"cpu_name": name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert _cpu_multiplies_bfloat16() == fast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_squared_relu_is_what_autograd_makes_of_it(dtype):
    x = torch.randn(3, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[0, :2] = torch.tensor([0.0, -0.0])
    x, grad = x.requires_grad_(), torch.linspace(-2, 2, 150).view(3, 50).to(dtype)
    wanted = x.relu().square()
    found = squared_relu(x)
    assert torch.equal(found, wanted)
    (of_found,), (of_wanted,) = (torch.autograd.grad(y, x, grad) for y in (found, wanted))
    assert torch.equal(of_found, of_wanted)


@pytest.mark.parametrize("rows", [0, 1, _WIDE_ROWS, _WIDE_ROWS + 1, 3 * _WIDE_ROWS - 1])
def test_products_computed_wide_in_pieces_of_rows(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, 24, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(40, 24, generator=generator).requires_grad_()
    grad = torch.randn(1, rows, 40, generator=generator).bfloat16()
    found = _WideProduct.apply(x, weight)
    of_x, of_weight = torch.autograd.grad(found, (x, weight), grad)
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(found, wanted.bfloat16(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(
        of_x, (grad.double() @ weight.double()).bfloat16(), atol=1e-2, rtol=1e-2
    )
    exact = grad[0].double().T @ x[0].double()
    torch.testing.assert_close(of_weight.double(), exact, atol=1e-3, rtol=1e-4)
