"""Files that somebody made to do harm, or that broke: one line, soon, in little memory.

What only one format can have is tested with its reader, in test_pth.py and test_ggmf.py.
"""

import ast
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import hostile_files as hostile
import numpy as np
import pytest
from hostile_files import KINDS, MODEL, outcome
from hypothesis import given, settings
from safetensors.torch import save_file
from test_pth import EVIL, unpickles

from receptance import formats
from receptance.data.ondisk import map_npy

every_kind = pytest.mark.parametrize("name", KINDS)
JSON = [name for name in KINDS if KINDS[name].file.endswith(".json")]
SAFETENSORS = [
    name for name in KINDS if KINDS[name].file in ("m.safetensors", "model.safetensors", "s",
    "weights.safetensors", "a.safetensors", "m.logits")
]  # fmt: skip


class ByKind(dict):
    """Something of each kind, of which hypothesis need not print all."""

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> ByKind:
    """Of each kind a folder, in which tests spoil a file."""
    folders = ByKind()
    for name, kind in KINDS.items():
        folders[name] = tmp_path_factory.mktemp("hostile")
        kind.write(folders[name])
        kind.read(folders[name])  # also brings the libraries that take memory of their own
    return folders


@pytest.fixture(scope="module", autouse=True)
def contents(whole) -> ByKind:
    """The file's content, before any test spoils it."""
    return ByKind({name: (whole[name] / KINDS[name].file).read_bytes() for name in KINDS})


def survives(name: str) -> bool:
    """Whether a broken file of this kind still is something that can be described."""
    return name.startswith("inspect") and name.endswith("config")


def refusal(name: str, folder: Path, content: bytes) -> str | None:
    (folder / KINDS[name].file).write_bytes(content)
    return outcome(KINDS[name].read, folder)


def test_the_bounds_are_noticed(monkeypatch):
    clock = SimpleNamespace(process_time=iter([7.0, 13.0]).__next__)
    with monkeypatch.context() as patch:
        patch.setattr(hostile, "time", clock)
        with pytest.raises(AssertionError, match=r"^6\.0 s"), hostile.bounded():
            pass
    if hostile.status("VmHWM") is None or not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells how much memory was used")
    with pytest.raises(AssertionError, match="MB"), hostile.bounded():
        bytearray(b"x") * (48 << 20)  # more than a process would keep for the next request


@every_kind
def test_a_file_that_ends_anywhere(name, whole, contents):
    content = contents[name]
    step = max(1, len(content) // 60)
    for size in {*range(0, min(len(content), 24)), *range(0, len(content), step)}:
        found = refusal(name, whole[name], content[:size])
        # Lines of a vocabulary end anywhere; a tensor of nothing ends a file of rwkv.cpp.
        assert found is not None or name == "World" or survives(name), size


@every_kind
@settings(max_examples=60)
@given(damage=hostile.damages)
def test_any_number_of_a_header_changed(name, whole, contents, damage):
    refusal(name, whole[name], damage.of(contents[name], KINDS[name].header))


@pytest.mark.parametrize("name", JSON)
@settings(max_examples=100)
@given(rewriting=hostile.rewritings)
def test_any_value_of_a_json_file_changed(name, whole, contents, rewriting):
    refusal(name, whole[name], rewriting.of(json.loads(contents[name])))


@pytest.mark.parametrize("name", SAFETENSORS)
@settings(max_examples=100)
@given(rewriting=hostile.rewritings)
def test_any_value_of_a_safetensors_header_changed(name, whole, contents, rewriting):
    changed = rewriting.of(hostile.header_of(contents[name]))
    refusal(name, whole[name], hostile.with_header(contents[name], changed))


@settings(max_examples=60)
@given(rewriting=hostile.rewritings)
def test_what_an_adapter_says_about_itself_changed(whole, contents, rewriting):
    for name in ("adapter", "inspect adapter"):
        header = hostile.header_of(contents[name])
        about = json.loads(header["__metadata__"]["about"])
        about["options"] = json.loads(about["options"])
        changed = json.loads(rewriting.of(about))
        if isinstance(changed, dict) and isinstance(changed.get("options"), dict):
            changed["options"] = json.dumps(changed["options"])
        header["__metadata__"]["about"] = json.dumps(changed)
        content = hostile.with_header(contents[name], json.dumps(header).encode())
        refusal(name, whole[name], content)


DEEP = {
    "lists": b"[" * 200_000,
    "dicts": b'{"a":' * 200_000,
    "closed lists": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"vocab_size": ' + b"9" * 1_000_000 + b"}",
    "string": b'{"model_type": "' + b"x" * 1_000_000 + b'"}',
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "nothing": b"",
    "zeros": bytes(10_000),
    "number": b"1e999",
    "keys": b"{" + b",".join(b'"%d":0' % n for n in range(50_000)) + b"}",
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("name", JSON)
def test_json_made_to_exhaust(name, kind, whole):
    assert refusal(name, whole[name], DEEP[kind]) is not None or survives(name)


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_headers_made_to_exhaust(name, kind, whole, contents):
    content = hostile.with_header(contents[name], DEEP[kind])
    assert refusal(name, whole[name], content) is not None


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


OFFSETS = {
    "overlapping": {"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])},
    "negative": {"a": tensor(-8, 0, [2])},
    "backwards": {"a": tensor(8, 0, [2])},
    "beyond the end": {"a": tensor(0, 2**40, [2**38])},
    "a gap": {"a": tensor(0, 8, [2]), "b": tensor(16, 24, [2])},
    "too few": {"a": tensor(0, 4, [2])},
    "an overflow": {"a": tensor(0, 0, [2**32, 2**32])},
    "nothing at all": {"a": tensor(0, 0, [0, 2**62])},
    "many": {str(n): tensor(0, 0, [0]) for n in range(20_000)},
}


@pytest.mark.parametrize("name", ["safetensors", "inspect safetensors", "state", "adapter"])
@pytest.mark.parametrize("kind", OFFSETS)
def test_offsets_that_lie(name, kind, whole):
    header = json.dumps(OFFSETS[kind]).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(24)
    assert refusal(name, whole[name], content) is not None or kind in ("nothing at all", "many")


def test_a_name_that_is_there_twice(whole):
    one = json.dumps(tensor(0, 8, [2]))
    header = f'{{"a": {one}, "a": {one}}}'.encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    assert refusal("safetensors", whole["safetensors"], content) is not None


@pytest.mark.parametrize("count", [2**31, 2**40, 2**61, 2**64 - 1])
def test_counts_that_no_file_holds(count, whole, contents):
    content = bytearray(contents["idx"])
    for at in (18, 26):
        struct.pack_into("<Q", content, at, count)
        assert "claims" in str(refusal("idx", whole["idx"], bytes(content)))
    length = f"({count},)".encode()
    array = contents["npy"].replace(b"(50,)", length)
    assert refusal("npy", whole["npy"], array) is not None


# ---- nothing runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVIL)
def test_objects_in_an_array_are_not_unpickled(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "evil.npy", np.array([EVIL[name]], dtype=object), allow_pickle=True)
    assert "evil.npy" in str(outcome(map_npy, tmp_path / "evil.npy"))
    assert not (tmp_path / "marker").exists()


def test_a_vocabulary_is_read_as_literals(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in ("1 open('marker','w') 1", "1 (" + "(" * 5000 + " 1", "1 " + "-" * 100_000 + "1 1",
                 "1 '" + "\\x41" * 100_000 + "' 5", "1 " + "9" * 100_000 + " 1"):  # fmt: skip
        assert refusal("World", whole["World"], line.encode()) is not None
    assert not (tmp_path / "marker").exists()


def test_shards_elsewhere_are_not_touched(whole, contents, tmp_path):
    save_file(MODEL.state_dict(), tmp_path / "secret.safetensors")
    index = json.loads(contents["transformers index"])
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        found = refusal(
            "transformers index", whole["transformers index"], json.dumps(index).encode()
        )
        assert "must lie in the same directory" in str(found)


def test_no_benchmark_unpickles():
    folder = Path(formats.__file__).parents[3] / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the sources are not here")
    found = {path.name: set(unpickles(ast.parse(path.read_text()))) for path in folder.glob("*.py")}
    assert not {name: what for name, what in found.items() if what}
