"""llama.cpp loads our files, gives our logits and texts, and reads blocks as we do.

It runs in a process of its own, because it ends the process that it fails in. Its copies of weights
for special instructions are switched off: with those of AMX, version 0.3.36 of llama-cpp-python
crashes on every quantized RWKV-7, its own files included. It multiplies float16, bfloat16 and
quantized matrices with activations of the same precision, hence the wider bounds for these.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_gguf import write
from test_gguf_tokenizer import world
from tiny import make_model, small_bpe

from receptance import Model, generate, load
from receptance.data.templates import TEMPLATES
from receptance.formats.gguf import open_gguf
from receptance.tokenizer import ByteTokenizer

missing = importlib.util.find_spec("llama_cpp") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing, reason="llama-cpp-python is not installed"),
]

TEXT = "12 little foxes,\n\n naïvely — 狐. It's <b> \\n\r\n\t"
TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "World": world(
        b"\n\n", b"it's", "狐".encode(), b"\xe7\x8b", b" little", b" lit", b"\\n", b"\"'"
    ),
    "BPE": small_bpe(),
}

RUN = """
import ctypes, json, sys
import numpy as np
import llama_cpp

path, text, count = sys.argv[1].encode(), sys.argv[2].encode(), int(sys.argv[3])
llama_cpp.llama_backend_init()
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
options = llama_cpp.llama_model_default_params()
options.use_extra_bufts = False
model = llama_cpp.llama_model_load_from_file(path, options)
assert model, "not loaded"
vocabulary = llama_cpp.llama_model_get_vocab(model)
options = llama_cpp.llama_context_default_params()
options.n_ctx, options.n_threads, options.n_threads_batch = 512, 1, 1
context = llama_cpp.llama_init_from_model(model, options)
ids = (llama_cpp.llama_token * 512)()
length = llama_cpp.llama_tokenize(vocabulary, text, len(text), ids, 512, False, False)
ids, size = list(ids[:length]), llama_cpp.llama_vocab_n_tokens(vocabulary)

def step(token):
    one = (llama_cpp.llama_token * 1)(token)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(one, 1)) == 0
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (size,)).copy()

logits, answer = [step(token) for token in ids], []
token, end = int(logits[-1].argmax()), llama_cpp.llama_vocab_eos(vocabulary)
while len(answer) < count and token != end:
    answer.append(token)
    token = int(step(token).argmax())

def piece(token):
    buffer = ctypes.create_string_buffer(256)
    length = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, 256, 0, True)
    return buffer.raw[:length]

message = llama_cpp.llama_chat_message(role=b"user", content=b"why?")
chat, buffer = (type(message) * 1)(message), ctypes.create_string_buffer(256)
template = llama_cpp.llama_model_chat_template(model, None)
length = llama_cpp.llama_chat_apply_template(template, chat, 1, True, buffer, 256)
print(json.dumps({
    "ids": ids,
    "logits": np.array(logits).tolist(),
    "answer": list(b"".join(map(piece, answer))),
    "pieces": list(b"".join(map(piece, ids))),
    "end": end,
    "turn": llama_cpp.llama_vocab_eot(vocabulary),
    "chat": buffer.raw[:length].decode(),
}))
"""

QUANTIZE = """
import ctypes, sys
import llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread, options.allow_requantize = int(sys.argv[3]), 1, True
paths = (path.encode() for path in sys.argv[1:3])
assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0
"""


def python(script: str, *words: object) -> str:
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


def theirs(path: Path, count: int = 0) -> dict:
    return json.loads(python(RUN, path, TEXT, count).splitlines()[-1])


@torch.no_grad()
def logits(model: Model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0][0]


def model_for(rows: int, version: float) -> Model:
    return make_model(rows, width=128, layers=3, version=version)


@pytest.mark.parametrize(
    ("version", "name"), [*((7, name) for name in TOKENIZERS), (6, "World"), (6, "BPE")]
)
def test_it_gives_our_ids_logits_and_text(tmp_path, version, name):
    tokenizer = TOKENIZERS[name]
    model = model_for(tokenizer.vocab_size, version)
    path = write(tmp_path / "x.gguf", model, tokenizer=tokenizer)
    found = theirs(path, count=40)
    assert found["ids"] == tokenizer.encode(TEXT)
    assert bytes(found["pieces"]) == TEXT.encode()
    torch.testing.assert_close(
        torch.tensor(found["logits"]), logits(model, found["ids"]), rtol=0, atol=5e-4
    )
    ours = generate(*load(path), TEXT, max_tokens=40, temperature=0, stop=())
    assert bytes(found["answer"]).decode(errors="replace") == ours
    assert found["end"] == tokenizer.end_of_text
    # llama.cpp itself takes <|endoftext|> for the end of a turn, if no other is named.
    turn = {"World": tokenizer.encode("\n\n")[0], "BPE": tokenizer.end_of_text, "bytes": -1}
    assert found["turn"] == turn[name]
    assert found["chat"] == TEMPLATES["world"].prompt("why?")


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(
    ("kind", "bound"), [("F16", 0.02), ("BF16", 0.1), ("Q8_0", 0.3), ("Q4_0", 0.3)]
)
def test_files_of_narrow_matrices(tmp_path, version, kind, bound):
    path = write(tmp_path / "x.gguf", model_for(256, version), kind, ByteTokenizer())
    found = theirs(path)
    file = open_gguf(path)
    wanted = logits(Model.from_tensors(file.config, dict(file), dtype=torch.float32), found["ids"])
    error = (torch.tensor(found["logits"]) - wanted).abs().max()
    assert error <= bound * wanted.abs().max()


# The kinds by llama_ftype: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K. Each file has several.
@pytest.mark.parametrize("kind", [7, 2, 3, 8, 9, 10, 12, 15, 17, 18])
def test_blocks_stand_for_the_same_values(tmp_path, kind):
    """llama.cpp quantizes our file, and turns that into float32 again, which must be what we read.

    Its products of float32 and int are contracted to one rounding, ours are not.
    """
    model = make_model(256, width=256, layers=1, version=7)
    paths = [write(tmp_path / "0.gguf", model), tmp_path / "1.gguf", tmp_path / "2.gguf"]
    python(QUANTIZE, paths[0], paths[1], kind)
    python(QUANTIZE, paths[1], paths[2], 0)
    narrow, wide = open_gguf(paths[1]), open_gguf(paths[2])
    assert wide.kinds == {"F32"} and len(narrow.kinds) > 1
    for name, tensor in wide.items():
        torch.testing.assert_close(narrow[name], tensor, rtol=3e-7, atol=3e-7, msg=name)
