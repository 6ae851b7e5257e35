"""The state as a value: rows, cat, and a file that knows its model."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from receptance.config import ModelConfig
from receptance.model import Model
from receptance.state import State

FINGERPRINT, OTHER = "a1" * 32, "b2" * 32


def model(layers: int = 2, width: int = 4) -> Model:
    return Model(ModelConfig(vocab_size=9, width=width, num_layers=layers)).requires_grad_(False)


@pytest.fixture
def state() -> State:
    """Four rows that have read different texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (4, 6), generator=generator)
    return model()(tokens, lengths=torch.tensor([6, 0, 3, 1]))[1]


def assert_bitwise(got: State, want: State) -> None:
    assert got.tensors.keys() == want.tensors.keys()
    assert torch.equal(got.tokens, want.tokens)
    for name, tensor in want.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(got.tensors[name], tensor), name


# ---- rows and cat -------------------------------------------------------------------------------

ROWS = {
    "an integer": (2, [2]),
    "the last": (-1, [3]),
    "an integer of numpy": (np.int64(2), [2]),
    "a tensor of one number": (torch.tensor(2), [2]),
    "a list, in its order": ([3, 0, 0], [3, 0, 0]),
    "no rows": ([], []),
    "a slice": (slice(1, 3), [1, 2]),
    "a slice with a step": (slice(None, None, 2), [0, 2]),
    "a tensor": (torch.tensor([1, 3]), [1, 3]),
    "a mask": (torch.tensor([True, False, False, True]), [0, 3]),
    "a list of bools": ([False, True, False, False], [1]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(state, name):
    index, wanted = ROWS[name]
    chosen = state.rows(index)
    assert chosen.batch == len(wanted)
    assert chosen.tokens.tolist() == [state.tokens.tolist()[i] for i in wanted]
    for part, tensor in state.tensors.items():
        assert torch.equal(chosen.tensors[part], tensor[:, wanted]), part


@pytest.mark.parametrize("index", [4, -5, [0, 9], [-5, 1], torch.tensor([4])])
def test_rows_that_are_not_there(state, index):
    with pytest.raises(ValueError, match=r"no row -?\d in a state of 4 rows"):
        state.rows(index)


@pytest.mark.parametrize("index", [1.5, [0.0], torch.ones(3, dtype=torch.bool)])
def test_rows_that_are_no_rows(state, index):
    with pytest.raises(ValueError, match="wanted numbers of rows, or 4 bools"):
        state.rows(index)


def test_cat_undoes_rows(state):
    assert_bitwise(State.cat([state.rows(i) for i in range(4)]), state)
    assert_bitwise(State.cat([state.rows(slice(0, 3)), state.rows([3])]), state)
    assert_bitwise(State.cat([state]), state)


def test_cat_of_other_models_or_of_nothing(state):
    with pytest.raises(ValueError, match="states of different models"):
        State.cat([state, model(layers=3).empty_state()])
    with pytest.raises(ValueError, match="states of different models"):
        State.cat([state, model(width=5).empty_state()])
    with pytest.raises(ValueError, match="needs at least one state"):
        State.cat([])


def test_size_in_memory(state):
    assert state.nbytes == 4 * 2 * 5 * 4 * 4  # rows, layers, vectors, channels, bytes
    assert model().bfloat16().empty_state(4).nbytes == 4 * 2 * (2 * 2 + 3 * 4) * 4


def test_detach_and_to_keep_the_numbers(state):
    assert_bitwise(state.to("cpu"), state)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    grown = model().requires_grad_()(tokens)[1]
    assert grown.tensors["numerator"].requires_grad
    assert not any(x.requires_grad for x in grown.detach().tensors.values())
    assert_bitwise(grown.detach(), grown)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_file_gives_back_every_bit(dtype, tmp_path):
    net = model().to(dtype)
    state = net(torch.tensor([[1, 2, 3], [4, 5, 6]]))[1]
    state.save(tmp_path / "state", net.fingerprint())
    loaded = State.load(tmp_path / "state", net.fingerprint())
    assert_bitwise(loaded, state)
    following = torch.tensor([[7], [8]])
    assert torch.equal(net(following, loaded)[0], net(following, state)[0])


@pytest.mark.parametrize("layers", [1, 2])
def test_views_and_shared_memory_can_be_saved(layers, tmp_path):
    empty = model(layers).empty_state(4)
    for number, each in enumerate(
        [empty, empty.rows(slice(None, None, 2)), empty.rows(1), State.cat([empty, empty])]
    ):
        each.save(tmp_path / str(number), FINGERPRINT)
        assert_bitwise(State.load(tmp_path / str(number), FINGERPRINT), each)


def test_a_state_with_gradients_can_be_saved(tmp_path):
    state = model().requires_grad_()(torch.tensor([[1, 2]]))[1]
    state.save(tmp_path / "state", FINGERPRINT)
    assert_bitwise(State.load(tmp_path / "state", FINGERPRINT), state)


def test_any_path(state, tmp_path):
    folder = tmp_path / "Zustände 状態 🦜"
    folder.mkdir()
    for path in (folder / "état.safetensors", str(folder / "no ending")):
        state.save(path, FINGERPRINT)
        assert_bitwise(State.load(path, FINGERPRINT), state)
    assert sorted(os.listdir(folder)) == ["no ending", "état.safetensors"]


def test_saving_again_replaces_the_file(state, tmp_path):
    state.rows(0).save(tmp_path / "state", FINGERPRINT)
    state.save(tmp_path / "state", FINGERPRINT)
    assert_bitwise(State.load(tmp_path / "state", FINGERPRINT), state)
    assert os.listdir(tmp_path) == ["state"]


def refuse(path, fingerprint: str = FINGERPRINT) -> str:
    """The message, which is one line that names the file."""
    with pytest.raises(ValueError) as refusal:
        State.load(path, fingerprint)
    message = str(refusal.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_state_of_another_model_is_refused_naming_both(state, tmp_path):
    state.save(tmp_path / "state", FINGERPRINT)
    message = refuse(tmp_path / "state", OTHER)
    assert FINGERPRINT[:12] in message and OTHER[:12] in message


def test_a_missing_file(tmp_path):
    assert "no state file" in refuse(tmp_path / "nowhere")
    assert "no state file" in refuse(tmp_path)
    assert "no state file" in refuse(tmp_path / ("x" * 300))


def test_every_truncation_is_noticed(state, tmp_path):
    state.save(tmp_path / "whole", FINGERPRINT)
    whole = (tmp_path / "whole").read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}:
        (tmp_path / "part").write_bytes(whole[:length])
        refuse(tmp_path / "part")


def test_every_changed_number_is_noticed(state, tmp_path):
    state.save(tmp_path / "whole", FINGERPRINT)
    whole = bytearray((tmp_path / "whole").read_bytes())
    (size,) = struct.unpack("<Q", whole[:8])
    for place in range(8 + size, len(whole), max(1, (len(whole) - size) // 100)):
        spoiled = whole.copy()
        spoiled[place] ^= 1 << place % 8
        (tmp_path / "spoiled").write_bytes(spoiled)
        assert "it does not hold what was written" in refuse(tmp_path / "spoiled")


def without_tokens(state: State) -> dict[str, torch.Tensor]:
    return {name: x.contiguous() for name, x in state.tensors.items()}


OURS = {"format": "receptance-state", "format_version": "1", "model": FINGERPRINT}
FOREIGN = {
    "garbage": lambda state: b"\x00\xff garbage \n" * 50,
    "text": lambda state: b"It was a dark and stormy night;\nthe rain fell in torrents.\n",
    "a header that is no JSON": lambda state: struct.pack("<Q", 20) + b"{" * 20,
    "a header longer than the file": lambda state: struct.pack("<Q", 2**40) + b"{}",
    "a pickle": lambda state: b"\x80\x02}q\x00.",
    "tensors of someone else": (without_tokens, None),
    "another format": (without_tokens, {**OURS, "format": "weights"}),
    "a later version": (without_tokens, {**OURS, "format_version": "2"}),
    "no model": (without_tokens, {k: v for k, v in OURS.items() if k != "model"}),
    "no token counts": (without_tokens, OURS),
    "token counts of other rows": (
        lambda state: without_tokens(state) | {"tokens": state.tokens[:3]},
        OURS,
    ),
    "numbers of another type": (
        lambda state: (
            {n: x.int() for n, x in without_tokens(state).items()} | {"tokens": state.tokens}
        ),
        OURS,
    ),
    "token counts that are no integers": (
        lambda state: without_tokens(state) | {"tokens": state.tokens.float()},
        OURS,
    ),
    "one token count for all": (
        lambda state: without_tokens(state) | {"tokens": state.tokens.sum()},
        OURS,
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused(state, name, tmp_path):
    content = FOREIGN[name]
    if callable(content):
        (tmp_path / "file").write_bytes(content(state))
    else:
        tensors, metadata = content
        save_file(tensors(state), tmp_path / "file", metadata=metadata)
    refuse(tmp_path / "file")


def test_the_header_says_what_the_file_is(state, tmp_path):
    state.save(tmp_path / "state", FINGERPRINT)
    content = (tmp_path / "state").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    digest = header["__metadata__"].pop("sha256")
    assert header["__metadata__"] == OURS and len(digest) == 64
    assert header["tokens"]["dtype"] == "I64"


def test_a_failed_write_says_so_and_leaves_nothing(state, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    inside = tmp_path / "folder" / "inside"
    inside.touch()
    monkeypatch.chdir(tmp_path / "folder")
    too_long = tmp_path / ("x" * 300)
    for path in (tmp_path / "nowhere" / "state", tmp_path / "folder", inside / "x", too_long, "."):
        with pytest.raises(ValueError, match="cannot write the state to") as refusal:
            state.save(path, FINGERPRINT)
        assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "inside"]


def test_a_failed_write_leaves_the_old_file(state, tmp_path, monkeypatch):
    state.save(tmp_path / "state", FINGERPRINT)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left on device"):
        state.rows(0).save(tmp_path / "state", FINGERPRINT)
    assert os.listdir(tmp_path) == ["state"]
    assert_bitwise(State.load(tmp_path / "state", FINGERPRINT), state)
