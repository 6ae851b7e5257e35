"""Where to train: a GPU if there is one, or what is named."""

import pytest
import torch

from receptance.model.devices import described, resolve_device
from receptance.training.options import StartOptions


@pytest.mark.parametrize(("available", "found"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_if_there_is_one(available, found, monkeypatch):
    tried, one = [], torch.ones(())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch, "zeros", lambda shape, device: tried.append(device) or one)
    assert StartOptions().device == "auto"
    assert resolve_device("auto") == torch.device(found)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert tried == [found, "cpu", "cuda:1"]  # whether something can be computed there


def test_a_name_there_is_not():
    with pytest.raises(ValueError, match=r"^device 'quantum' cannot be used here: ") as caught:
        resolve_device("quantum")
    assert "\n" not in str(caught.value)


def test_processors_have_no_numbers():
    with pytest.raises(ValueError, match=r"^device 'cpu:7' .*all processors are one device"):
        resolve_device("cpu:7")


def test_it_is_told_in_words(monkeypatch):
    assert described(torch.device("cpu")) == "cpu (1 thread)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert described(torch.device("cuda", 1)) == "cuda:1 (GPU 1)"
