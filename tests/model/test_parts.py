"""Rules that no model shows."""

import pytest
import torch

from receptance.model.parts import _cpu_multiplies_bfloat16


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
