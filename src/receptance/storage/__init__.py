"""Directories that lose nothing: written whole, sealed with digests, opened with proof.

The modules, in reading order:

    manifest     name, length and digest of every file in a directory
    directories  directories that are whole or absent, and the checkpoints of a run
    lock         who may write into the folder of a run
    opening      what lies at a path, looked at once
    pairing      which tokenizer belongs to which weights
    quantized    what lies on disk of a quantized model
    checkpoint   a model and its tokenizer on disk, and `load`
"""
