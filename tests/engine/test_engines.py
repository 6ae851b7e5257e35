"""What every engine answers to those who use one, whatever it is."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tiny import make_model, same_bits

from receptance.adapters.lora import LoRA, LoRAOptions
from receptance.engine.adapted import AdaptedModel
from receptance.engine.base import Engine
from receptance.engine.load import native_engine
from receptance.ops import native

TOKENS = torch.tensor([[1, 2, 3]])


def gpu() -> Engine:
    from gpu_cases import engine_of

    return engine_of(make_model(), "float32")


def native_kernels() -> Engine:
    if not native.is_available():
        pytest.skip("the native kernels were not built")
    model = make_model()
    return native_engine(model.config, dict(model.state_dict()))


def adapted() -> Engine:
    model = make_model()
    lora = LoRA(model, LoRAOptions(dropout=0.5, rank=2))
    torch.nn.init.ones_(lora.pairs[0].up.weight)
    return AdaptedModel(model, lora)


every_engine = pytest.mark.parametrize("make", [make_model, adapted, native_kernels, gpu])
compiled = pytest.mark.parametrize("make", [native_kernels, gpu])


@every_engine
@torch.no_grad()
def test_a_state_is_kept_in_a_file(make: Callable[[], Engine], tmp_path):
    engine = make()
    with engine.evaluating():
        state = engine(TOKENS.to(engine.device))[1]
        engine.save_state(state, tmp_path / "state")
        found = engine.load_state(tmp_path / "state")
        assert same_bits(found.tensors, state.tensors)
        assert found.tokens.tolist() == [3] and found.tokens.device == engine.device
        engine(TOKENS.to(engine.device), found)


@every_engine
def test_a_state_of_another_model_is_refused(make: Callable[[], Engine], tmp_path):
    other = make_model(seed=2)
    other.save_state(other.empty_state(), tmp_path / "state")
    with pytest.raises(ValueError, match=r"belongs to model .*, not to this one"):
        make().load_state(tmp_path / "state")


@every_engine
def test_a_step_reads_all_weights_but_the_embedding(make: Callable[[], Engine]):
    engine = make()
    assert engine.weight_bytes - engine.bytes_per_token >= 256 * 16 * 4
    assert 0 < engine.bytes_per_token < engine.weight_bytes


def test_the_bytes_of_a_model_and_its_adapter():
    """Seven matrices in each of two layers have a pair of rank 2."""
    model, engine = make_model(), adapted()
    weights = sum(4 * x.numel() for x in model.parameters())
    pairs = 2 * (6 * (16 + 16) + (16 + 64) + (64 + 16) - (16 + 16)) * 2 * 4
    assert model.weight_bytes == weights
    assert model.bytes_per_token == weights - 4 * 256 * 16
    assert engine.weight_bytes == weights + pairs
    assert engine.bytes_per_token == weights + pairs - 4 * 256 * 16


@torch.no_grad()
def test_evaluating_is_for_the_length_of_a_block():
    """Every module has its own mode afterwards, also after an error."""
    model = make_model().train()
    model.dropout = 0.5
    model.blocks[0].ffn.eval()
    modes = [module.training for module in model.modules()]
    wanted = make_model()(TOKENS)[0]
    with model.evaluating():
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(TOKENS)[0], wanted)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="int64"), model.evaluating():
        model(TOKENS.float())
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model(TOKENS)[0], wanted)


@torch.no_grad()
def test_an_adapter_evaluates_with_its_model():
    engine = adapted()
    assert not torch.equal(engine(TOKENS)[0], engine(TOKENS)[0])
    with engine.evaluating():
        assert torch.equal(engine(TOKENS)[0], engine(TOKENS)[0])
    assert not torch.equal(engine(TOKENS)[0], engine(TOKENS)[0])


@compiled
@pytest.mark.parametrize("use", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_of_kernels_has_no_copy(make: Callable[[], Engine], use: Callable):
    with pytest.raises(TypeError, match=r"is neither copied nor pickled.*share this one") as caught:
        use(make())
    assert "\n" not in str(caught.value) and "Engine" in str(caught.value)
