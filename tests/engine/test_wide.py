"""Products of bfloat16 in float32."""

import pytest
import torch
from tiny import make_model

from receptance.engine import wide
from receptance.engine.wide import (
    _WIDE_ROWS,
    WideLinear,
    _WideProduct,
    cpu_multiplies_bfloat16,
    widen,
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
    found = {"cpu_name": name, "amx_tile": amx, "avx512_bf16": avx512_bf16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert cpu_multiplies_bfloat16.__wrapped__() == fast


@pytest.mark.parametrize("fast", [False, True])
def test_a_model_is_widened_only_where_that_is_faster(monkeypatch, fast):
    monkeypatch.setattr(wide, "cpu_multiplies_bfloat16", lambda: fast)
    model = make_model()
    names = list(model.state_dict())
    tokens = torch.arange(40).view(2, 20)
    before = model(tokens)[0]
    widen(model)
    widen(model)
    assert isinstance(model.head, WideLinear) != fast
    assert list(model.state_dict()) == names
    assert torch.equal(model(tokens)[0], before)  # nothing changes in float32
    narrow = model.bfloat16()(tokens)[0]
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), before, atol=0.2, rtol=0.1)


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
