"""One whole file of every kind that is read, and ways to spoil it."""

import contextlib
import json
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import make_model, small_bpe

from receptance import State, formats
from receptance.adapters import LoRAOptions, load_adapter, make_adapter
from receptance.checking import recorded
from receptance.checking.inspecting import inspect
from receptance.data.binidx import binidx_writer
from receptance.data.ondisk import npy_writer
from receptance.data.tokens import TokenFiles, close_folder
from receptance.formats.ggmf import write_ggmf
from receptance.formats.gguf import open_gguf, stored_kinds, write_gguf
from receptance.formats.names_hf import to_hf
from receptance.quantize.weights import quantize_tensors
from receptance.sealed import MANIFEST
from receptance.storage import checkpoint
from receptance.storage.manifest import plain_files, seal_file, write_manifest
from receptance.storage.quantized import About, read_quantized, write_quantized
from receptance.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

MODEL = make_model(19, width=8, layers=1)
WHOLE = make_model(256, width=8, layers=1)
SEVEN = make_model(300, width=8, layers=1, version=7)
WHOSE = MODEL.fingerprint()
WORLD = "".join(f"{n + 1} {bytes([n])!r} 1\n" for n in range(256)) + "257 'ab' 2\n"

# Files here are read in a few hundredths of a second of the processor's time and in at most 18 MB,
# which may be new to the process or left from other tests.
SECONDS = 5.0
GROWTH = 40 << 20  # bytes


@dataclass(frozen=True)
class Kind:
    """A kind of file: how to write one, which file of it to spoil, how it is read."""

    write: Callable[[Path], object]
    """Into an empty folder."""
    file: str
    read: Callable[[Path], object]
    """What reads that folder."""
    header: int = 400
    """Bytes with numbers worth changing."""


def pth(zipped: bool) -> Callable[[Path], object]:
    return lambda folder: torch.save(
        MODEL.state_dict(), folder / "m.pth", _use_new_zipfile_serialization=zipped
    )


def transformers(folder: Path) -> None:
    tensors = {to_hf(name): x for name, x in MODEL.state_dict().items()}
    first = dict(list(tensors.items())[:9])
    rest = {name: x for name, x in tensors.items() if name not in first}
    files = {"model-1.safetensors": first, "model-2.safetensors": rest}
    for name, part in files.items():
        save_file(part, folder / name)
    index = {"metadata": {}, "weight_map": {x: n for n, part in files.items() for x in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "rwkv", "hidden_size": 8, "layer_norm_epsilon": 1e-5}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def of_llama_cpp(folder: Path, tokenizer: Tokenizer | None = None) -> None:
    config = SEVEN.config
    kinds = stored_kinds(config, dict.fromkeys(config.architecture.layouts(config), "F32"))
    write_gguf(folder / "m.gguf", config, SEVEN.state_dict(), kinds, tokenizer)


def own(folder: Path) -> None:
    checkpoint.write_model(WHOLE, folder, ByteTokenizer())


def quantized(folder: Path) -> None:
    about = About(kind="int8", group=128, source=WHOSE)
    weights = quantize_tensors(WHOLE.state_dict(), "int8", None)
    write_quantized(folder / "q", WHOLE.config, ByteTokenizer(), about, weights)
    for file in (folder / "q").iterdir():
        file.rename(folder / file.name)
    (folder / "q").rmdir()


def seal(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, {n: seal_file(folder / n) for n in plain_files(folder)})


def sealed(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """For one who spoils a file and its manifest, too: digests are no defence."""
    return lambda folder: (seal(folder), read(folder))


def own_and_sealed(folder: Path) -> None:
    own(folder)
    seal(folder)


def adapter(folder: Path) -> None:
    make_adapter(MODEL, LoRAOptions(rank=2)).save(folder / "a.safetensors", WHOSE)


def record(folder: Path) -> None:
    tokens, logits = torch.arange(8), torch.zeros(8, 19)
    recorded.write(folder / "m.logits", tokens, logits, model=WHOSE, stored="float32")


def binidx(folder: Path) -> None:
    with binidx_writer(folder / "x", np.dtype("<u2"), 0) as append:
        append(np.array([5, 6, 0, 7, 0, 1, 2], np.uint16))


def npy(folder: Path) -> None:
    with npy_writer(folder / "x.npy", np.dtype("<u2")) as append:
        append(np.arange(50, dtype=np.uint16))


def corpus(folder: Path) -> None:
    for part in ("train", "validation"):
        with npy_writer(folder / f"{part}.npy", np.dtype("<u2")) as append:
            append(np.arange(50, dtype=np.uint16))
    close_folder(folder, ByteTokenizer(), 0, {})


KINDS = {
    "pth": Kind(pth(True), "m.pth", formats.read),
    "legacy pth": Kind(pth(False), "m.pth", formats.read),
    "safetensors": Kind(
        lambda folder: save_file(MODEL.state_dict(), folder / "m.safetensors"),
        "m.safetensors",
        formats.read,
    ),
    "rwkv.cpp": Kind(
        lambda folder: write_ggmf(folder / "m.bin", MODEL.config, MODEL.state_dict(), "FP16"),
        "m.bin",
        lambda folder: formats.read(folder / "m.bin"),
    ),
    "rwkv.cpp 7": Kind(
        lambda folder: write_ggmf(folder / "m.bin", SEVEN.config, SEVEN.state_dict(), "FP16"),
        "m.bin",
        lambda folder: formats.read(folder / "m.bin"),
    ),
    "llama.cpp": Kind(of_llama_cpp, "m.gguf", formats.read, header=4000),
    "tokenizer of llama.cpp": Kind(
        lambda folder: of_llama_cpp(folder, small_bpe()),
        "m.gguf",
        lambda folder: open_gguf(folder / "m.gguf").tokenizer(),
        header=10_000,
    ),
    "transformers config": Kind(transformers, "config.json", formats.read),
    "transformers index": Kind(transformers, "model.safetensors.index.json", formats.read),
    "checkpoint config": Kind(own, "config.json", sealed(checkpoint.load)),
    "checkpoint weights": Kind(own, "model.safetensors", sealed(checkpoint.load)),
    "manifest": Kind(own_and_sealed, MANIFEST, checkpoint.load),
    "quantized config": Kind(quantized, "config.json", sealed(read_quantized)),
    "quantized weights": Kind(quantized, "weights.safetensors", sealed(read_quantized)),
    "state": Kind(
        lambda folder: MODEL.empty_state(2).save(folder / "s", WHOSE),
        "s",
        lambda folder: State.load(folder / "s", WHOSE),
    ),
    "adapter": Kind(
        adapter, "a.safetensors", lambda folder: load_adapter(folder / "a.safetensors", MODEL)
    ),
    "recorded logits": Kind(record, "m.logits", lambda folder: recorded.read(folder / "m.logits")),
    "BPE": Kind(
        lambda folder: small_bpe().save(folder),
        "tokenizer.json",
        lambda folder: load_tokenizer(folder / "tokenizer.json"),
    ),
    "World": Kind(
        lambda folder: (folder / "rwkv_vocab.txt").write_text(WORLD),
        "rwkv_vocab.txt",
        lambda folder: load_tokenizer(folder / "rwkv_vocab.txt"),
    ),
    "idx": Kind(binidx, "x.idx", lambda folder: TokenFiles.open(folder / "x")),
    "npy": Kind(npy, "x.npy", lambda folder: TokenFiles.open(folder / "x.npy")),
    "corpus": Kind(corpus, "data.json", TokenFiles.open),
}
LOOKED_AT = ("pth", "legacy pth", "safetensors", "rwkv.cpp", "llama.cpp", "transformers config")
LOOKED_AT += ("checkpoint config", "quantized config", "state", "adapter")
KINDS |= {
    f"inspect {name}": Kind(
        KINDS[name].write,
        KINDS[name].file,
        (lambda folder: inspect(folder / "s")) if name == "state" else
        (lambda folder: inspect(folder / "m.bin")) if name == "rwkv.cpp" else
        (lambda folder: inspect(folder / "a.safetensors")) if name == "adapter" else inspect,
    )
    for name in LOOKED_AT
}  # fmt: skip


# ---- damage --------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Damage:
    """A change of some bytes: a number, a piece that is missing or there twice."""

    kind: str
    at: int
    """Counted from either end, up to the length of a header."""
    from_end: bool
    size: int
    number: int

    def of(self, content: bytes, header: int) -> bytes:
        at = self.at % min(header, len(content))
        at = len(content) - 1 - at if self.from_end else at
        if self.kind == "cut":
            return content[:at] + content[at + self.size :]
        if self.kind == "double":
            return content[: at + self.size] + content[at:]
        size = 1 << self.size % 4
        number = (self.number % 256**size).to_bytes(size, "little")
        return content[:at] + number + content[at + size :]


damages = st.builds(
    Damage,
    st.sampled_from(["number", "number", "cut", "double"]),
    st.integers(0, 1000),
    st.booleans(),
    st.integers(1, 64),
    st.sampled_from(NUMBERS) | st.integers(0, 255),
)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = (
    *(None, True, -1, 0, 1, 7, 2**31, 2**63, 2**64, 10**40, -(2**63), 0.5, 1e308, float("nan")),
    *("", "x", "x" * 3000, "../../elsewhere", "/etc/passwd", "a\nb\x1b[31m\0", "\ud800"),
    *([], {}, [0], [-1, 5], [2**62, 2**62], {"a": {}}, nested(200)),
)


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value in a document."""
    yield path
    if isinstance(document, (dict, list)):
        keys = document if isinstance(document, dict) else range(len(document))
        for key in keys:
            yield from places(document[key], (*path, key))


@dataclass(frozen=True)
class Rewriting:
    """A value of a JSON document that is replaced, removed, or called something else."""

    change: str
    place: int
    by: int

    def of(self, document: Any) -> bytes:
        ways = list(places(document))
        *outer, last = ways[self.place % len(ways)] or (None,)
        hostile = HOSTILE[self.by % len(HOSTILE)]
        if last is None:
            return json.dumps(hostile).encode()
        document = json.loads(json.dumps(document))
        parent = document
        for key in outer:
            parent = parent[key]
        if self.change == "replace":
            parent[last] = hostile
        elif self.change == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            names = ["", "x", "a\nb", *parent]
            parent[names[self.by % len(names)]] = parent.pop(last)
        return json.dumps(document).encode()


rewritings = st.builds(
    Rewriting,
    st.sampled_from(["replace", "replace", "remove", "rename"]),
    # The outer values come first, and are fewer.
    st.integers(0, 12) | st.integers(0, 10_000),
    st.integers(0, 1000),
)


def with_header(content: bytes, header: bytes) -> bytes:
    """A safetensors file with another header."""
    (size,) = struct.unpack_from("<Q", content)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def header_of(content: bytes) -> Any:
    (size,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + size])


# ---- what must be true ---------------------------------------------------------------------------


def status(name: str) -> int | None:
    """A line of this process's memory in bytes, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails if the block takes too long or too much memory, whoever allocates it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before, began = status("VmRSS"), time.process_time()
    yield
    took, peak = time.process_time() - began, status("VmHWM")
    assert took < SECONDS, f"{took:.1f} s"
    if before is not None and peak is not None:
        assert peak - before < GROWTH, f"{(peak - before) / 1e6:.0f} MB"


def outcome(read: Callable[[Path], object], path: Path) -> str | None:
    """The refusal, of one line; None if the file was read."""
    with bounded():
        try:
            read(path)
        except ValueError as error:
            message = str(error)
        else:
            return None
    assert message and "\n" not in message and len(message) < 2000, message
    return message
