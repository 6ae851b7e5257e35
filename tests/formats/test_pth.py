"""Reading .pth files: right ones bit for bit, wrong ones refused in words, evil ones never run."""

import ast
import copyreg
import io
import os
import pickle
import time
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import receptance.formats.pth as pth
from receptance.formats.pth import read_pth

SOURCES = Path(pth.__file__).parents[1]
BOTH = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


def save(value: object, path: Path, as_zip: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=as_zip)
    return path


def with_index(path: Path, index: bytes, **kwargs) -> Path:
    """A zip checkpoint with this pickle as its index, and 8 bytes of data."""
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        archive.writestr("archive/data.pkl", index)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", b"\0" * 8)
        archive.writestr("archive/version", "3\n")
    return path


def with_legacy_index(path: Path, index: bytes, keys: bytes = b"].") -> Path:
    """A checkpoint of the older format: five pickles, the fourth is the index."""
    header = (pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    path.write_bytes(b"".join(header) + index + b"\x80\x02" + keys)
    return path


WITH_INDEX = pytest.mark.parametrize("with_index", [with_index, with_legacy_index])


# What was saved comes back.


@BOTH
def test_a_tensor_of_two_names_is_two_tensors(tmp_path, official, as_zip):
    """torch.save keeps a tied head and embedding as one, which safetensors refuses to write."""
    tied = official | {"head.weight": official["emb.weight"]}
    found = read_pth(save(tied, tmp_path / "tied.pth", as_zip))
    assert torch.equal(found["head.weight"], official["emb.weight"])
    addresses = {tensor.data_ptr() for tensor in found.values()}
    assert len(addresses) == len(found) == len(official)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_come_back_bit_for_bit(tmp_path, official, assert_same, dtype, as_zip):
    tensors = {name: tensor.to(dtype) for name, tensor in official.items()}
    assert_same(read_pth(save(tensors, tmp_path / "model.pth", as_zip)), tensors)


@BOTH
def test_state_dicts_of_modules_and_parameters_are_read(tmp_path, assert_same, as_zip):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    wanted = {name: value.detach() for name, value in module.state_dict().items()}
    assert_same(read_pth(save(module.state_dict(), tmp_path / "a.pth", as_zip)), wanted)
    parameters = OrderedDict(module.named_parameters())
    assert_same(read_pth(save(parameters, tmp_path / "b.pth", as_zip)), wanted)


@BOTH
def test_views_shared_storage_and_odd_strides_are_read(tmp_path, assert_same, as_zip):
    base = torch.arange(24.0).view(6, 4)
    tensors = {"base": base, "part": base[2:5], "turned": base.t(), "same": base}
    assert_same(read_pth(save(tensors, tmp_path / "views.pth", as_zip)), tensors)


def test_zip_files_are_mapped_not_copied(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux's list of mapped files")
    path = save({"a": torch.ones(100_000)}, tmp_path / "mapped.pth")
    tensors = read_pth(path)
    assert str(path) in maps.read_text()
    assert tensors["a"].sum() == 100_000
    tensors["a"][0] = 7  # a private copy of the page: the file stays as it is
    assert read_pth(path)["a"][0] == 1


# What is refused, and how it is said.


REFUSED = {
    "not a tensor": {"emb.weight": torch.zeros(2), "epoch": 3},
    "'state_dict' is a OrderedDict, not a tensor": {"state_dict": OrderedDict(a=torch.ones(1))},
    "holds a list": [torch.zeros(2)],
    "holds a Tensor": torch.zeros(2),
    "empty dict": {},
    "key of its dict is a int": {1: torch.zeros(2)},
    "by the `rwkv` package": {"emb.weight": torch.zeros(2), "_strategy": "cpu fp32"},
    "claims more values": {"bomb": torch.zeros(1).expand(1000, 1000, 1000)},
    "_rebuild_sparse_tensor": {"a": torch.eye(3).to_sparse()},
    "ComplexFloatStorage": {"a": torch.zeros(2, dtype=torch.complex64)},
    "argparse.Namespace": {"a": torch.zeros(2), "args": Namespace(lr=1)},
}


@BOTH
@pytest.mark.parametrize("words", REFUSED)
def test_anything_but_plain_tensors_by_name_is_refused(tmp_path, refusal, words, as_zip):
    path = save(REFUSED[words], tmp_path / "other.pth", as_zip)
    assert words in refusal(read_pth, path)


@WITH_INDEX
def test_quantized_tensors_are_refused(tmp_path, refusal, with_index):
    # Written by hand: making one with torch warns that the function is going away.
    index = b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_qtensor\n)Rs."
    path = with_index(tmp_path / "quantized.pth", index)
    assert "torch._utils._rebuild_qtensor" in refusal(read_pth, path)


def test_what_is_plainly_not_a_checkpoint_is_named(tmp_path, refusal):
    def refused(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return refusal(read_pth, tmp_path / name)

    assert "empty" in refused("a.pth", b"")
    assert "git lfs pull" in refused("b.pth", b"version https://git-lfs.github.com/spec/v1\n")
    assert "web page" in refused("c.pth", b"<!DOCTYPE html><html></html>")
    assert "rwkv.cpp" in refused("d.bin", b"fmggd\0\0\0")
    assert "not one that torch.save wrote" in refused("e.pth", b"N.")
    assert "protocol 4" in refused("f.pth", pickle.dumps({"a": 1}, protocol=4))
    (tmp_path / "directory.pth").mkdir()
    assert "directory" in refusal(read_pth, tmp_path / "directory.pth")
    assert "No such file" in refusal(read_pth, tmp_path / "absent.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a file" in refusal(read_pth, tmp_path / "pipe.pth")


def append(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)


def test_other_zip_archives_are_named(tmp_path, refusal):
    path = tmp_path / "other.pth"
    append(path, "word/document.xml", b"<w/>")
    assert "not one that torch.save wrote" in refusal(read_pth, path)
    with_index(path, b"\x80\x02}.")
    append(path, "archive/constants.pkl", b"\x80\x02).")
    assert "it is a TorchScript program" in refusal(read_pth, path)
    with_index(path, b"\x80\x02}.")
    with pytest.warns(UserWarning, match="Duplicate"):
        append(path, "archive/data.pkl", b"\x80\x02}.")
    assert "two entries of the same name" in refusal(read_pth, path)


# What torch.load alone would take without a word (tried with torch 2.13).


def test_compressed_data_is_refused(tmp_path, refusal):
    saved = save({"a": torch.ones(64)}, tmp_path / "saved.pth")
    path = tmp_path / "compressed.pth"
    with (
        zipfile.ZipFile(saved) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed" in refusal(read_pth, path)


def tensor_index(count: int, shape: bytes, key: bytes = b"0", legacy: bool = False) -> bytes:
    """The pickle of {"a": a float32 tensor of that shape, over data of `count` values}."""
    reference = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key
    reference += b"X\x03\0\0\0cpu\x8a\x08" + count.to_bytes(8, "little", signed=True)
    reference += b"NtQ" if legacy else b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"K\0" + shape
    return b"\x80\x02}X\x01\0\0\0a" + rebuild + b"K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."


def with_legacy_data(path: Path, count: int, shape: bytes) -> Path:
    """The same in the older format: after its pickles the number of values and the values."""
    with_legacy_index(path, tensor_index(count, shape, legacy=True), b"](X\x01\0\0\0" + b"0e.")
    path.write_bytes(path.read_bytes() + (2).to_bytes(8, "little") + bytes(8))
    return path


TWO = b"K\x02\x85"


def test_the_hand_made_files_are_good_ones(tmp_path):
    path = tmp_path / "good.pth"
    assert read_pth(with_index(path, tensor_index(2, TWO)))["a"].tolist() == [0, 0]
    assert read_pth(with_legacy_data(path, 2, TWO))["a"].tolist() == [0, 0]


@pytest.mark.parametrize("count", [0, 1, 3, 1000, 2**40, 2**62, -2, -(2**40)])
def test_an_index_that_wants_other_data_than_there_is_gets_refused(tmp_path, refusal, count):
    path = tmp_path / "bomb.pth"
    assert "is damaged" in refusal(read_pth, with_index(path, tensor_index(count, TWO)))
    if count not in (0, 1):  # here torch makes room for the tensor's two values, and reads them
        refusal(read_pth, with_legacy_data(path, count, TWO))


@pytest.mark.parametrize("shape", [b"\x8a\x06" + b"\xff" * 5 + b"\x0f\x85", b"J\0\0\0\x7f\x85"])
def test_a_tensor_larger_than_its_data_is_refused(tmp_path, refusal, shape):
    path = tmp_path / "bomb.pth"
    refusal(read_pth, with_index(path, tensor_index(2, shape)))
    refusal(read_pth, with_legacy_data(path, 2, shape))


def test_data_that_is_not_there_is_refused(tmp_path, refusal):
    path = with_legacy_index(tmp_path / "lost.pth", tensor_index(2, TWO, legacy=True))
    assert "list of data" in refusal(read_pth, path)
    path = with_index(tmp_path / "lost.pth", tensor_index(2, TWO, key=b"7"))
    assert "wants 8 bytes of data where there are none" in refusal(read_pth, path)


# Evil files. None may run, all must be told what they asked for.


class Evil:
    """Pickles as a call; `marker` appears in the working directory if anyone makes it."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EVIL = {
    "posix.system": Evil(os.system, "touch marker"),
    "eval": Evil(eval, "open('marker', 'w')"),
    "exec": Evil(exec, "open('marker', 'w')"),
    "open": Evil(open, "marker", "w"),
    "getattr": Evil(getattr, "", "join"),
    "pathlib.PosixPath": Path("marker"),
    "torch.serialization.load": Evil(torch.load, "other.pth"),
    "torch.hub.load": Evil(torch.hub.load, "nobody/nothing"),
}


@pytest.fixture
def inert(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working directory in which no marker may have appeared by the end of the test."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not Path("marker").exists()


@BOTH
@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("wrapped", [False, True])
def test_evil_checkpoints_are_refused_by_name(inert, refusal, name, as_zip, wrapped):
    value = {"emb.weight": torch.zeros(2), "x": EVIL[name]} if wrapped else EVIL[name]
    message = refusal(read_pth, save(value, inert / "evil.pth", as_zip))
    assert "nothing in it was run" in message and f"{name}'" in message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("in_zip", [True, False], ids=["in zip", "bare"])
@pytest.mark.parametrize("name", ["posix.system", "eval"])
def test_evil_pickles_of_every_protocol_are_refused_by_name(inert, refusal, name, in_zip, protocol):
    index = pickle.dumps([EVIL[name], EVIL[name]], protocol)
    path = inert / "evil.pth"
    if in_zip:
        with_index(path, index)
    else:
        path.write_bytes(index)
    message = refusal(read_pth, path)
    assert "nothing in it was run" in message and f"{name}'" in message


@WITH_INDEX
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("posix.system", b"(iposix\nsystem\nS'touch marker'\n."),
        ("posix.system", b"\x80\x02}cposix\nsystem\nX\x0c\0\0\0touch marker\x85Rb."),
        # The name put on the stack by way of the memo, in another order.
        ("posix.system", b"\x80\x04\x8c\x06system\x94\x8c\x05posix\x94h\x00\x93."),
        # A forbidden function behind an allowed one, and as the state of an allowed object.
        ("posix.system", b"\x80\x02ctorch._utils\n_rebuild_parameter\n(cposix\nsystem\ntR."),
        ("os.system", b"\x80\x02ccollections\nOrderedDict\n)Rcos\nsystem\nb."),
        ("torch._utils._rebuild_device_tensor_from_numpy",
         b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R."),
    ],
)  # fmt: skip
def test_hand_written_evil_is_refused_by_name(inert, refusal, name, index, with_index):
    assert f"'{name}'" in refusal(read_pth, with_index(inert / "evil.pth", index))


def test_an_extension_code_does_not_help(inert, refusal):
    copyreg.add_extension("posix", "system", 240)
    try:
        index = b"\x80\x02\x82\xf0X\x0c\0\0\0touch marker\x85R."
        refusal(read_pth, with_index(inert / "evil.pth", index))
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_what_torch_was_told_to_trust_is_still_refused(inert, refusal):
    path = save({"a": Evil(time.strftime, "%Y")}, inert / "evil.pth")
    with torch.serialization.safe_globals([(time.strftime, "time.strftime")]):
        assert "time.strftime" in refusal(read_pth, path)


# Files made to exhaust: the C stack (a tuple hashes by recursion), time, or memory.


MILLION = 1_000_000
EXHAUSTING = {
    "tuples": b"})" + b"\x85" * MILLION + b"K\x01s.",
    "tuples by memo": b"})q\0" + b"h\0h\0\x86q\0" * 60 + b"K\x01s.",
    "wide tuples": b"}(" + b"N" * MILLION + b"tK\x01s.",
    "wide tuples by memo": b"})q\0" + (b"(" + b"h\0" * 60 + b"tq\0") * 9 + b"K\x01s.",
    "lists": b"]" * MILLION + b"a" * (MILLION - 1) + b".",
    "dicts": b"}" + b"X\x01\0\0\0a}" * 100_000 + b"s" * 100_000 + b".",
    "marks": b"(" * MILLION + b"t" * MILLION + b".",
    "long string": b"}X\xff\xff\xff\xffabc.",
    "memo number": b"}r\xff\xff\xff\xff.",
    "large index": b"}" + b"N0" * 3 * MILLION + b".",
    "no operands": b"ut\x85Rbs.",
}


@WITH_INDEX
@pytest.mark.parametrize("kind", EXHAUSTING)
def test_exhausting_files_are_refused(tmp_path, refusal, kind, with_index):
    refusal(read_pth, with_index(tmp_path / "bomb.pth", b"\x80\x02" + EXHAUSTING[kind]))


def test_a_large_index_packed_small_is_refused(tmp_path, refusal):
    path = with_index(tmp_path / "bomb.pth", bytes(10 * MILLION), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    assert "its index is larger" in refusal(read_pth, path)


# Damage. Anything may be wrong with a file; it ends in one ValueError, soon.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def intact(request) -> bytes:
    buffer = io.BytesIO()
    tensors = {
        "emb.weight": torch.arange(36.0).view(9, 4),
        "blocks.0.ln1.weight": torch.ones(4).bfloat16(),
    }
    torch.save(tensors, buffer, _use_new_zipfile_serialization=request.param)
    return buffer.getvalue()


def test_files_cut_short_anywhere_are_refused(scratch, refusal, intact):
    path = scratch / "cut.pth"
    for size in range(0, len(intact), 5):
        path.write_bytes(intact[:size])
        refusal(read_pth, path)


@settings(max_examples=120)
@given(data=st.data())
def test_changed_bytes_give_tensors_or_a_refusal(scratch, refusal, intact, data):
    damaged = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(intact) - 1))] = data.draw(st.integers(0, 255))
    path = scratch / "changed.pth"
    path.write_bytes(damaged)
    try:
        tensors = read_pth(path)
    except ValueError:
        refusal(read_pth, path)
    else:
        assert all(tensor.shape for tensor in tensors.values())


STARTS = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]


@settings(max_examples=100)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300))
def test_random_bytes_are_refused(scratch, refusal, start, rest):
    path = scratch / "random.pth"
    path.write_bytes(start + rest)
    refusal(read_pth, path)


INSTRUCTIONS = [
    b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"K\x01", b"R", b"b",
    b"a", b"e", b"s", b"u", b"Q", b"q\0", b"h\0", b"\x81", b"0", b"2", b"X\x01\0\0\0a",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n",
]  # fmt: skip


@settings(max_examples=150)
@given(program=st.lists(st.sampled_from(INSTRUCTIONS), max_size=40))
def test_random_programs_of_allowed_instructions_are_refused(scratch, refusal, program):
    path = with_index(scratch / "program.pth", b"\x80\x02" + b"".join(program) + b".")
    refusal(read_pth, path)


# The rule that makes all this enough.


def unpickles(tree: ast.AST) -> Iterator[str]:
    """What in a module could unpickle something."""
    modules = ("pickle", "_pickle", "pickletools", "cPickle", "dill", "joblib", "shelve", "marshal")
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in modules)
            case ast.ImportFrom(module=str() as module, names=names):
                loads = module.startswith("torch") and any(name.name == "load" for name in names)
                if module.split(".")[0] in modules or loads:
                    yield module
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield "torch.load"
            case ast.keyword(arg="allow_pickle" | "weights_only" as name):
                yield name


def test_no_other_module_unpickles():
    found = {
        str(path.relative_to(SOURCES)): sorted(set(unpickles(ast.parse(path.read_text()))))
        for path in SOURCES.rglob("*.py")
    }
    guilty = {path: what for path, what in found.items() if what}
    assert guilty == {
        "formats/pickles.py": ["pickletools"],  # which only names instructions
        "formats/pth.py": ["pickle", "torch.load", "weights_only"],
    }
