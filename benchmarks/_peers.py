"""Whom cpu_inference.py compares with, in what, and how near their logits have to be."""

TORCH, CPP, PACKAGE, HF, LLAMA = "torch", "rwkv.cpp", "rwkv", "transformers", "llama.cpp"
INSTALL = {
    CPP: "build https://github.com/RWKV/rwkv.cpp and pass --rwkv-cpp PATH/librwkv.so",
    PACKAGE: "pip install rwkv",
    HF: "pip install transformers",
    LLAMA: "pip install llama-cpp-python",
}
VERSIONS = {CPP: (4, 5.2, 6, 7), PACKAGE: (4, 5.2, 6), HF: (4,), LLAMA: (6, 7)}
# Our type of weights, and what of each peer it is compared with.
PEERS = {
    "float32": {CPP: "FP32", PACKAGE: "float32", HF: "float32", LLAMA: "F32"},
    "bfloat16": {CPP: "FP16", PACKAGE: "bfloat16", HF: "bfloat16"},
    "float16": {CPP: "FP16", LLAMA: "F16"},
    "int8": {CPP: "Q8_0", LLAMA: "Q8_0"},
    "int4": {CPP: "Q4_0", LLAMA: "Q4_0"},
}
# Root mean square difference of logits, relative to theirs, from the torch model in float32 with
# the same, rounded weights. Products with integers round the activations, too.
LIMITS = {"float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5, "int8": 2e-3, "int4": 2e-3}
PEER_LIMIT = 1e-5
# llama.cpp is compared with the torch model of its own file, as it quantizes in its own way. It
# rounds activations to the type of the weights.
LLAMA_LIMITS = {"F32": PEER_LIMIT, "F16": 5e-3, "Q8_0": 5e-2, "Q4_0": 5e-2}
