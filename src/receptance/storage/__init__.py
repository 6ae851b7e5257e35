"""Directories that lose nothing: written whole, sealed with digests, opened with proof.

The modules, in reading order:

    manifest     name, length and digest of every file in a directory
    directories  directories that are whole or absent, and the checkpoints of a run
    lock         who may write into the folder of a run
    checkpoint   a model and its tokenizer on disk, and `load`
    quantized    what lies on disk of a quantized model
"""
