"""Other implementations of RWKV-7 with the same weights: rwkv, rwkv7-hf and the loop of fla.

rwkv chooses the version by an environment variable when it is imported, so it runs in a process of
its own. It reads a .pth file, has no batches, and rounds the constant of the decay to 0.606531.
rwkv7-hf takes token 0 for padding. fla stores its state transposed.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from model_cases import relative_error, token_ids
from tiny import make_model

from receptance.formats.hf_config import config_fields
from receptance.formats.names_hf import is_transposed, to_hf
from receptance.model import Model
from receptance.ops import wkv7

BOUND = 1e-5
SIZES = {
    # name: (layers, width, vocabulary)
    "2 layers": (2, 64, 53),
    "4 layers": (4, 128, 101),
}
every_size = pytest.mark.parametrize("name", SIZES)


@functools.cache
def model(name: str) -> Model:
    layers, width, vocab_size = SIZES[name]
    return make_model(vocab_size, width=width, layers=layers, version=7, value_rank=16)


# ---- rwkv ---------------------------------------------------------------------------------------

SCRIPT = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()):
    import torch
    from rwkv.model import RWKV
    theirs = RWKV(model=sys.argv[1], strategy="cpu fp32")
    tokens, cut = json.loads(sys.argv[2]), int(sys.argv[3])
    state = theirs.generate_zero_state()
    first, state = theirs.forward(tokens[:cut], state, full_output=True)
    logits = [first]
    for token in tokens[cut:]:
        one, state = theirs.forward([token], state)
        logits.append(one[None])
torch.save((torch.cat(logits), state), sys.argv[1] + ".out")
"""


@every_size
def test_rwkv_gives_the_same_logits_and_states(name, tmp_path):
    pytest.importorskip("rwkv")
    ours, tokens = model(name), token_ids(0, 1, 40, vocab_size=SIZES[name][2])
    path = tmp_path / "m"
    torch.save(ours.state_dict(), f"{path}.pth")
    environment = os.environ | {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    command = [sys.executable, "-c", SCRIPT, str(path), json.dumps(tokens[0].tolist()), "25"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=500)
    wanted, state = torch.load(f"{path}.out")
    with torch.no_grad():
        logits, after = ours(tokens)
    assert relative_error(logits[0], wanted) < BOUND
    for layer in range(SIZES[name][0]):
        parts = state[3 * layer : 3 * layer + 3]
        for field, theirs in zip(
            ("time_shift", "value_by_key", "channel_shift"), parts, strict=True
        ):
            assert relative_error(after.tensors[field][layer, 0], theirs) < BOUND, field


# ---- rwkv7-hf -----------------------------------------------------------------------------------


@functools.cache
def reference(name: str):
    """rwkv7-hf's model with the same weights."""
    package = pytest.importorskip("rwkv7_hf")
    ours = model(name)
    fields = config_fields(ours.config, torch.float32)
    theirs = package.RWKV7ForCausalLM(package.RWKV7Config(**fields)).eval()
    unused = ours.config.architecture.unused(ours.config)
    weights = {to_hf(n, 7): x for n, x in ours.state_dict().items() if n not in unused}
    shapes = {n: x.shape for n, x in theirs.state_dict().items()}
    turned = {n: x.T if is_transposed(n) else x for n, x in weights.items()}
    theirs.load_state_dict({n: x.reshape(shapes[n]).clone() for n, x in turned.items()})
    return theirs


@every_size
def test_rwkv7_hf_gives_the_same_logits_and_gradients(name):
    theirs, ours = reference(name), model(name)
    # Theirs has no gradient for the embedding of token 0, which it takes for padding.
    tokens = token_ids(0, 3, 40, vocab_size=SIZES[name][2]).clamp(min=1)
    wanted = theirs(tokens, return_dict=True).logits
    logits, _ = ours(tokens)
    assert relative_error(logits, wanted) < BOUND
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape, generator=generator)
    parameters = dict(theirs.named_parameters())
    names = [n for n, x in ours.named_parameters() if x.requires_grad]
    mine = torch.autograd.grad((logits * weights).sum(), [ours.get_parameter(n) for n in names])
    other = [parameters[to_hf(n, 7)] for n in names]
    want = torch.autograd.grad((wanted * weights).sum(), other)
    for n, got, x in zip(names, mine, want, strict=True):
        x = x.T if is_transposed(to_hf(n, 7)) else x
        assert relative_error(got, x.reshape(got.shape)) < 1e-4, n


# ---- fla ----------------------------------------------------------------------------------------


def test_the_loop_of_flash_linear_attention_gives_the_same():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns that there is no GPU.
        naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    generator = torch.Generator().manual_seed(0)
    shape = 2, 30, 3, 8
    r, k, v, a, b = (torch.randn(shape, generator=generator) / 2 for _ in range(5))
    w = -0.6 * torch.rand(shape, generator=generator)
    start = torch.randn(2, 3, 8, 8, generator=generator)
    ours, after = wkv7(r, w, k, v, a, b, start)
    q, w, k, v, a, b = (x.transpose(1, 2) for x in (r * 8**0.5, w, k, v, a, b))
    out, state = naive.dplr_recurrence(q, k, v, a, b, w, start.mT)
    assert relative_error(ours, out.transpose(1, 2)) < BOUND
    assert relative_error(after, state.mT) < BOUND
