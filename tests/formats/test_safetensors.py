"""The writer of safetensors files, read with the library's own reader."""

import random
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from receptance.formats.safetensors import ALIGNMENT, write_safetensors

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8]
shapes = st.lists(st.integers(1, 9) | st.sampled_from([16, 32, 64]), min_size=1, max_size=3)
plans = st.dictionaries(
    st.text(min_size=1, max_size=9).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), shapes.map(tuple)),
    max_size=9,
)


@given(plan=plans, seed=st.integers(0, 99))
def test_the_library_reads_what_was_written_in_any_order(plan, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("aligned") / "x.safetensors"
    generator = torch.Generator().manual_seed(seed)
    wanted = {
        name: torch.randint(100, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in plan.items()
    }
    order = random.Random(seed).sample(list(wanted), len(wanted))
    write_safetensors(path, plan, ((name, wanted[name]) for name in order))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(plan)
        for name, tensor in wanted.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            if tensor.nbytes % ALIGNMENT == 0:
                assert found.data_ptr() % ALIGNMENT == 0


def test_a_view_is_written_as_what_it_shows(tmp_path):
    tensor = torch.arange(24.0).view(4, 6).T[1:, ::2]
    write_safetensors(tmp_path / "x", {"x": (tensor.dtype, tensor.shape)}, [("x", tensor)])
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), tensor)


@pytest.mark.parametrize("tensors", [[], [("x", torch.zeros(3))], [("x", torch.zeros(2).int())]])
def test_what_was_not_planned_is_a_mistake_of_ours(tensors, tmp_path):
    with pytest.raises(AssertionError):
        write_safetensors(tmp_path / "x", {"x": (torch.float32, (2,))}, tensors)


def test_nothing_is_kept_in_memory(tmp_path):
    plan = {str(n): (torch.uint8, (64,)) for n in range(20)}
    made: list[weakref.ref] = []

    def one_by_one():
        for name in plan:
            tensor = torch.zeros(64, dtype=torch.uint8)
            made.append(weakref.ref(tensor))
            yield name, tensor
            assert sum(ref() is not None for ref in made) <= 2

    write_safetensors(tmp_path / "x", plan, one_by_one())
