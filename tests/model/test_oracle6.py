"""Other implementations of RWKV-5 and RWKV-6 with the same weights: rwkv and the loop of fla.

rwkv reads environment variables at import and holds one version of its class, so it runs in a
process of its own. It reads the initial state from the tensors `time_state` of a file, but not for
a single head, because it drops axes of size 1.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from model_cases import relative_error, token_ids
from tiny import make_model

from receptance.adapters import StateTuning, StateTuningOptions
from receptance.formats.names import TIME_STATE
from receptance.model import Model
from receptance.ops import wkv6

BOUND = 1e-5
SIZES = {
    # name: (version, layers, width, vocabulary)
    "6, 2 layers": (6, 2, 192, 53),
    "6, 4 layers": (6, 4, 128, 101),
    "5.2": (5.2, 3, 128, 53),
    "5.1": (5.1, 3, 128, 53),
    "5.0": (5.0, 3, 192, 53),
}
every_size = pytest.mark.parametrize("name", SIZES)
CUT = 25


@functools.cache
def model(name: str) -> Model:
    version, layers, width, vocab_size = SIZES[name]
    made = make_model(vocab_size, width=width, layers=layers, version=version)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 3 and parameter.shape[0] > 1:
                parameter.mul_(0.3)
    return made


@functools.cache
def adapter(name: str) -> StateTuning:
    """A learned initial state, drawn."""
    tuned = StateTuning(model(name), StateTuningOptions())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tuned.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return tuned


def tokens_of(name: str) -> torch.Tensor:
    return token_ids(0, 1, 40, vocab_size=SIZES[name][-1])


# ---- rwkv ---------------------------------------------------------------------------------------

SCRIPT = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()):
    import torch
    from rwkv.model import RWKV
    found, cut = {}, int(sys.argv[3])
    for name, tokens in json.loads(sys.argv[2]).items():
        theirs = RWKV(model=f"{sys.argv[1]}/{name}", strategy="cpu fp32")
        first, state = theirs.forward(tokens[:cut], None, full_output=True)
        logits = [first]
        for token in tokens[cut:]:
            one, state = theirs.forward([token], state)
            logits.append(one[None])
        found[name] = torch.cat(logits), state
torch.save(found, sys.argv[1] + "/out")
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Logits and last states of rwkv, by name."""
    pytest.importorskip("rwkv")
    folder: Path = tmp_path_factory.mktemp("rwkv")
    for name in SIZES:
        states = dict(enumerate(adapter(name).tensors()["value_by_key"].detach()))
        learned = {TIME_STATE.format(layer): x.clone() for layer, x in states.items()}
        torch.save(model(name).state_dict() | learned, folder / f"{name}.pth")
    tokens = json.dumps({name: tokens_of(name)[0].tolist() for name in SIZES})
    environment = os.environ | {"RWKV_V7_ON": "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    command = [sys.executable, "-c", SCRIPT, str(folder), tokens, str(CUT)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=500)
    return torch.load(folder / "out")


@every_size
def test_rwkv_gives_the_same_logits_and_states(name, theirs):
    wanted, state = theirs[name]
    with torch.no_grad():
        logits, after = model(name)(tokens_of(name), adapter(name).initial_state())
    assert relative_error(logits[0], wanted) < BOUND
    fields = ("time_shift", "key_by_value", "channel_shift")
    for layer in range(model(name).config.num_layers):
        for field, part in zip(fields, state[3 * layer : 3 * layer + 3], strict=True):
            assert relative_error(after.tensors[field][layer, 0], part) < BOUND, field


# ---- fla ----------------------------------------------------------------------------------------


def test_the_loop_of_flash_linear_attention_gives_the_same():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns that there is no GPU.
        naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive")
    generator = torch.Generator().manual_seed(0)
    shape = 2, 30, 3, 8
    r, k, v = (torch.randn(shape, generator=generator) / 2 for _ in range(3))
    w = -torch.randn(shape, generator=generator).exp()
    bonus = torch.randn(3, 8, generator=generator)
    start = torch.randn(2, 3, 8, 8, generator=generator)
    ours, after = wkv6(r, w, k, v, bonus, start)
    q, k, v, w = (x.transpose(1, 2) for x in (r, k, v, w))
    out, state = naive.naive_recurrent_rwkv6(
        q, k, v, w, bonus, scale=1.0, initial_state=start, output_final_state=True
    )
    assert relative_error(ours, out.transpose(1, 2)) < BOUND
    assert relative_error(after, state) < BOUND
