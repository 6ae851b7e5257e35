"""Values that are put into parameters: whole, or a share of each."""

import pytest
import torch
import torch.distributed as dist
from tiny import make_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from training_cases import make_trainer, run, save, small

from receptance.training.saving import restore
from receptance.training.sharding import assign, fill, gather
from receptance.training.trainer import Trainer


@pytest.fixture(params=[False, True], ids=["whole", "shares"])
def target(request):
    """A parameter [2,3] of zeros, in one piece or as a share of one process."""
    if not request.param:
        yield torch.zeros(2, 3)
        return
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield distribute_tensor(torch.zeros(2, 3), DeviceMesh("cpu", [0]), [Shard(0)])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (2, 1, 3, 1)])
def test_axes_of_size_1_may_differ(shape, target):
    values = torch.arange(6.0)
    assign(target, values.view(shape))
    assert torch.equal(gather(target), values.view(2, 3))


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 3), (3,), (2, 2), ()])
def test_another_matrix_is_refused(shape, target):
    """A transposed one has as many values, and a smaller one could be repeated."""
    with pytest.raises(ValueError, match=r"does not fit a parameter of shape \[2, 3\]") as caught:
        assign(target, torch.ones(shape))
    assert f"a tensor of shape {list(shape)} " in str(caught.value)
    assert not gather(target).any()


def test_a_transposed_matrix_of_the_model_is_refused():
    model = make_model()
    name = "blocks.0.ffn.key.weight"
    with pytest.raises(ValueError, match="does not fit a parameter"):
        fill(model, {name: model.get_parameter(name).detach().T}.items())


def test_a_trainer_that_is_restored_checks_it_too(tmp_path):
    trainer = make_trainer(small())
    run(trainer, 1)
    directory = save(trainer, tmp_path)
    other: Trainer = make_trainer(small())
    other.parameters["blocks.0.ffn.key.weight"].data = torch.zeros(16, 64)
    with pytest.raises(ValueError, match="does not fit a parameter"):
        restore(other, directory)
