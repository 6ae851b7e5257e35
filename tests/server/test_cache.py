"""The cache of states: the longest known beginning, within a budget, on disk as well."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_cases import NAMESPACE
from tiny import same_bits

from receptance.server.cache import StateCache
from receptance.server.shelf import StateDirectory
from receptance.state import State

OTHER = "b" * 64
ROOM = 1 << 20


def state_of(tokens, size: int = 64) -> State:
    """A state from which one can tell which tokens it has read."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % (1 << 31))
    return State({"x": torch.randn(1, 1, size, generator=generator)}, torch.tensor([len(tokens)]))


def is_state_of(state: State | None, tokens) -> bool:
    return state is not None and same_bits(state.tensors, state_of(tokens).tensors)


@pytest.fixture
def shelf(tmp_path) -> StateDirectory:
    return StateDirectory(tmp_path / "states", ROOM)


texts = st.lists(st.integers(0, 2), max_size=6).map(tuple)


@given(kept=st.lists(texts, max_size=8), asked=texts, most=st.integers(0, 7))
def test_the_longest_beginning_is_found(kept, asked, most):
    cache = StateCache(ROOM)
    for tokens in kept:
        cache.add(NAMESPACE, tokens, state_of(tokens))
    fitting = [t for t in kept if t and len(t) <= most and asked[: len(t)] == t]
    longest = max(fitting, key=len, default=())
    found = cache.find(NAMESPACE, asked, most)
    assert found.length == len(longest)
    assert is_state_of(found.state, longest) if longest else found.state is None
    assert cache.find(OTHER, asked, most).state is None


@given(st.lists(texts, min_size=1, max_size=30), st.integers(300, 1500))
def test_the_budget_is_kept_and_counted_exactly(kept, budget):
    cache = StateCache(budget)
    for tokens in kept:
        cache.add(NAMESPACE, tokens, state_of(tokens))
        assert cache.nbytes <= budget
    while cache._recent:
        cache._evict(next(iter(cache._recent)))
    assert cache.nbytes == 0 and all(not root.children for root in cache._roots.values())


def test_what_was_not_used_for_longest_goes_first():
    cache = StateCache(3 * (256 + 36))
    for token in (1, 2, 3):
        cache.add(NAMESPACE, (token,), state_of((token,)))
    cache.find(NAMESPACE, (1, 9), 1)
    cache.add(NAMESPACE, (4,), state_of((4,)))
    found = {token: cache.find(NAMESPACE, (token, 9), 1).reason for token in (1, 2, 3, 4, 5)}
    assert found == {1: "hit", 2: "evicted", 3: "hit", 4: "hit", 5: "new_text"}
    assert cache.outcomes == {"hit": 4, "evicted": 1, "new_text": 1} and cache.evicted == 1


def test_the_place_where_texts_part_is_told():
    cache = StateCache(ROOM)
    text = tuple(range(100))
    assert cache.find(NAMESPACE, text, 99).reason == "new_namespace"
    cache.add(NAMESPACE, text, state_of(text))
    found = cache.find(NAMESPACE, (*text[:50], 0, 0), 51)
    assert (found.reason, found.branch) == ("no_snapshot", 50)
    assert cache.find(NAMESPACE, (*text[:5], 0, 0), 6).branch is None  # not worth it
    cache.add(NAMESPACE, text[:40], state_of(text[:40]))
    found = cache.find(NAMESPACE, (*text[:80], 0), 80)
    assert (found.length, found.branch) == (40, 80)


def test_a_snapshot_keeps_no_other_memory_alive():
    batch = State({"x": torch.zeros(1, 1000, 64)}, torch.zeros(1000, dtype=torch.int64))
    view = State({"x": batch.tensors["x"][:, 3:4]}, batch.tokens[3:4])
    cache = StateCache(ROOM)
    cache.add(NAMESPACE, (1,), view)
    found = cache.find(NAMESPACE, (1, 2), 1).state
    assert found is not None and found.tensors["x"].untyped_storage().nbytes() == 256


def test_what_has_no_room_is_found_on_the_shelf(shelf):
    cache = StateCache(2 * (256 + 10 * 36), shelf)
    kept = [tuple(random.Random(n).choices(range(50), k=3)) for n in range(20)]
    for tokens in kept:
        cache.add(NAMESPACE, tokens, state_of(tokens))
    assert len(cache) < 5
    for tokens in kept:
        assert is_state_of(cache.find(NAMESPACE, (*tokens, 1), 3).state, tokens)
    shelf.close()


def test_a_new_server_knows_what_the_last_one_did(shelf):
    cache = StateCache(ROOM, shelf)
    kept = [(1, 2, 3), (1, 2), (7,)]
    for tokens in kept:
        cache.add(NAMESPACE, tokens, state_of(tokens))
    shelf.close()
    again = StateDirectory(shelf.directory, ROOM)
    cache = StateCache(ROOM, again)
    assert len(cache) == 0
    for tokens in kept:
        assert is_state_of(cache.find(NAMESPACE, (*tokens, 9), 9).state, tokens)
    assert again.damaged == 0
    again.close()


def damage_state(directory: Path) -> None:
    """Change a byte in the middle of every tensor."""
    for path in directory.glob("*.state"):
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)


def damage_ids(directory: Path) -> None:
    for path in directory.glob("*.ids"):
        path.write_bytes(path.read_bytes()[:-4] + b"\1\0\0\0")


def cut(directory: Path) -> None:
    for path in directory.glob("*.state"):
        path.write_bytes(path.read_bytes()[:-10])


def lose_states(directory: Path) -> None:
    for path in directory.glob("*.state"):
        path.unlink()


def lose_ids(directory: Path) -> None:
    for path in directory.glob("*.ids"):
        path.unlink()


@pytest.mark.parametrize("damage", [damage_state, damage_ids, cut, lose_states, lose_ids])
def test_damaged_entries_are_dropped(shelf, damage):
    cache = StateCache(ROOM, shelf)
    cache.add(NAMESPACE, (1, 2), state_of((1, 2)))
    shelf.close()
    (shelf.directory / ".x.0123.partial").write_bytes(b"half")
    damage(shelf.directory)
    again = StateDirectory(shelf.directory, ROOM)
    cache = StateCache(ROOM, again)
    found = cache.find(NAMESPACE, (1, 2, 3), 2)
    assert found.state is None and found.reason in ("damaged", "new_namespace")
    assert again.damaged == 1
    cache.add(NAMESPACE, (1, 2), state_of((1, 2)))
    assert is_state_of(cache.find(NAMESPACE, (1, 2, 3), 2).state, (1, 2))
    again.close()
    assert {path.suffix for path in again.directory.iterdir()} == {".ids", ".state"}


def test_the_directory_has_a_budget(tmp_path):
    shelf = StateDirectory(tmp_path, 3000)
    cache = StateCache(500, shelf)
    for token in range(20):
        cache.add(NAMESPACE, (token,), state_of((token,)))
    shelf.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3000
    cache = StateCache(ROOM, again := StateDirectory(tmp_path, 3000))
    assert is_state_of(cache.find(NAMESPACE, (19, 0), 1).state, (19,))
    assert cache.find(NAMESPACE, (0, 0), 1).state is None
    again.close()


def test_a_full_disk_loses_no_answer(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    shelf = StateDirectory(tmp_path / "states", ROOM)
    monkeypatch.setattr(State, "save", full)
    cache = StateCache(ROOM, shelf)
    cache.add(NAMESPACE, (1, 2), state_of((1, 2)))
    assert is_state_of(cache.find(NAMESPACE, (1, 2, 3), 2).state, (1, 2))
    shelf.close()
    assert shelf.failures == 1 and list(shelf.directory.iterdir()) == []


def test_what_the_directory_lost_leaves_the_tree(tmp_path):
    shelf = StateDirectory(tmp_path, 2000)
    cache = StateCache(1000, shelf)
    for token in range(30):
        cache.add(NAMESPACE, (token, 1), state_of((token, 1)))
        shelf._queue.put(None)
        shelf._thread.join()
        shelf._thread = type(shelf._thread)(target=shelf._write_all)
        shelf._thread.start()
    assert cache.nbytes <= 1000
    shelf.close()
