"""Layouts of packed weights: every element where the kernels look for it, and back again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from receptance.quantize import Quantized, ceil_div
from receptance.quantize.packing import FLOATS, Layout, Packed, dtypes, pack, shapes, unpack

# More outputs than the layout "rows" pads to.
WIDE = 100
LAYOUTS: list[Layout] = ["tiles", "rows", "embedding"]
FORMATS = [("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128)]

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_format = pytest.mark.parametrize(("kind", "group"), FORMATS)


def noise(*shape: int) -> Tensor:
    """Normal random numbers, the same ones every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def codes(kind: str, group: int, outputs: int, inputs: int, seed: int = 0) -> Quantized:
    """Random ones, every value among them."""
    generator = torch.Generator().manual_seed(seed)
    size = outputs, ceil_div(inputs, group)
    scale, minimum = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    if kind == "int8":
        drawn = torch.randint(-127, 128, (outputs, inputs), generator=generator)
        return Quantized("int8", group, drawn.to(torch.int8), scale, None)
    drawn = torch.randint(16, (outputs, inputs), generator=generator)
    return Quantized("int4", group, drawn.to(torch.uint8), scale, minimum)


def same(one: Quantized, other: Quantized) -> bool:
    formats = [(x.kind, x.group) for x in (one, other)]
    tensors = (one.codes, other.codes), (one.params(), other.params())
    return formats[0] == formats[1] and all(torch.equal(a, b) for a, b in tensors)


class TestRoundTrip:
    @given(
        st.sampled_from(LAYOUTS),
        st.sampled_from(FORMATS),
        st.integers(1, 200),
        st.integers(1, 200),
        st.integers(0, 99),
    )
    def test_codes_come_back(self, layout, form, outputs, inputs, seed):
        weight = codes(*form, outputs, inputs, seed)
        assert same(unpack(pack(weight, layout)), weight)

    @given(
        st.sampled_from(LAYOUTS),
        st.sampled_from(list(FLOATS.values())),
        st.integers(1, 200),
        st.integers(1, 200),
    )
    def test_floats_come_back(self, layout, dtype, outputs, inputs):
        weight = noise(outputs, inputs).to(dtype)
        weight[0, 0] = torch.nan
        found = unpack(pack(weight, layout))
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert found.dtype == dtype
        assert torch.equal(found.view(bits), weight.view(bits))

    def test_a_view_is_packed_like_its_copy(self):
        weight = noise(70, 40).T[2:, ::3]
        assert torch.equal(unpack(pack(weight, "tiles")), weight)


# Not multiples of anything that matters.
N, K = 35, 203


class TestPlaces:
    """Element (n,k) is where the table at the top of packing.py says."""

    def test_floats_in_tiles(self):
        weight = noise(N, K)
        data = pack(weight, "tiles").data
        assert data.shape == (3, K, 16)
        for n, k in everywhere(N, K):
            assert data[n // 16, k, n % 16] == weight[n, k]
        assert not data[2, :, 3:].any()

    def test_floats_in_rows(self):
        weight = noise(WIDE, K)
        data = pack(weight, "rows").data
        assert data.shape == (K, 128)
        assert torch.equal(data[:, :WIDE], weight.T)
        assert not data[:, WIDE:].any()

    def test_int8_in_tiles(self):
        weight = codes("int8", 128, N, K)
        packed = pack(weight, "tiles")
        assert packed.data.shape == (3, 64, 16, 4)
        assert packed.params.shape == (3, 2, 16)
        for n, k in everywhere(N, K):
            assert packed.data[n // 16, k // 4, n % 16, k % 4] == weight.codes[n, k]
            assert packed.params[n // 16, k // 128, n % 16] == weight.scale[n, k // 128]
        assert packed.data.bool().sum() == weight.codes.bool().sum()

    @pytest.mark.parametrize("group", [32, 64, 128])
    def test_int4_in_tiles(self, group):
        weight = codes("int4", group, N, K)
        packed = pack(weight, "tiles")
        assert packed.data.shape == (3, 32, 16, 4)
        assert packed.params.shape == (3, 256 // group, 2, 16)
        for n, k in everywhere(N, K):
            word = int.from_bytes(bytes(packed.data[n // 16, k // 8, n % 16].tolist()), "little")
            assert word >> 4 * (k % 8) & 15 == weight.codes[n, k]
            scale, minimum = packed.params[n // 16, k // group, :, n % 16]
            assert (scale, minimum) == (weight.scale[n, k // group], weight.minimum[n, k // group])

    def test_groups_of_padding_alone_are_zero(self):
        packed = pack(codes("int4", 32, N, 40), "tiles")
        assert packed.params[:, :2, :, :3].all()
        assert not packed.params[:, 2:].any()
        assert not packed.data[:, 5:].any()

    def test_int8_in_rows(self):
        weight = codes("int8", 128, WIDE, K)
        packed = pack(weight, "rows")
        assert packed.data.shape == (K, 2, 16, 4)
        assert packed.params.shape == (2, 128)
        for n, k in everywhere(WIDE, K):
            assert packed.data[k, n // 64, n % 16, n % 64 // 16] == weight.codes[n, k]
        assert torch.equal(packed.params[:, :WIDE], weight.scale.T)

    def test_int4_in_rows(self):
        weight = codes("int4", 64, WIDE, K)
        packed = pack(weight, "rows")
        assert packed.data.shape == (K, 2, 8, 4)
        assert packed.params.shape == (4, 2, 128)
        for n, k in everywhere(WIDE, K):
            word = int.from_bytes(packed.data[k, n // 64, n % 8].tolist(), "little")
            assert word >> 4 * (n % 64 // 8) & 15 == weight.codes[n, k]
            scale, minimum = packed.params[k // 64, :, n]
            assert (scale, minimum) == (weight.scale[n, k // 64], weight.minimum[n, k // 64])

    def test_int8_as_an_embedding(self):
        weight = codes("int8", 128, N, K)
        packed = pack(weight, "embedding")
        assert torch.equal(packed.data, weight.codes)
        assert torch.equal(packed.params, weight.scale)

    def test_int4_as_an_embedding(self):
        weight = codes("int4", 32, N, K)
        packed = pack(weight, "embedding")
        assert packed.data.shape == (N, 102)
        assert packed.params.shape == (N, 7, 2)
        for n, k in everywhere(N, K):
            assert int(packed.data[n, k // 2]) >> 4 * (k % 2) & 15 == weight.codes[n, k]
        assert torch.equal(packed.params, torch.stack([weight.scale, weight.minimum], -1))


def everywhere(outputs: int, inputs: int) -> list[tuple[int, int]]:
    """The borders and some places between."""
    rows = {*range(0, outputs, 7), outputs - 1}
    return [(n, k) for n in rows for k in {*range(0, inputs, 5), inputs - 1}]


class TestPacked:
    @every_layout
    @every_format
    def test_shapes_and_types_are_those_promised(self, layout, kind, group):
        packed = pack(codes(kind, group, N, K), layout)
        assert (packed.data.shape, packed.params.shape) == shapes(kind, layout, N, K, group)
        assert (packed.data.dtype, packed.params.dtype) == dtypes(kind)
        assert packed.data.is_contiguous()
        assert packed.params.is_contiguous()
        assert packed.nbytes == packed.data.nbytes + packed.params.nbytes

    @every_layout
    def test_tensors_begin_at_lines_of_the_cache(self, layout):
        packed = pack(codes("int4", 64, N, K), layout)
        assert packed.data.data_ptr() % 64 == packed.params.data_ptr() % 64 == 0

    @pytest.mark.parametrize(("kind", "group", "bits"), [("int8", 128, 8.125), ("int4", 64, 4.5)])
    @every_layout
    def test_bits_per_weight(self, layout, kind, group, bits):
        assert 8 * pack(codes(kind, group, 64, 256), layout).nbytes / (64 * 256) == bits

    def test_refusals(self):
        packed = pack(codes("int4", 64, N, K), "tiles")
        with pytest.raises(ValueError, match="has "):
            Packed("int4", "tiles", N, K, 32, packed.data, packed.params)
        with pytest.raises(ValueError, match="stored as"):
            Packed("int4", "tiles", N, K, 64, packed.data.view(torch.int8), packed.params)
        for wrong in (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3)):
            with pytest.raises(ValueError, match="a matrix to pack is"):
                pack(wrong, "tiles")
