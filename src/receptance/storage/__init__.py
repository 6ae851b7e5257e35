"""Directories that lose nothing: they are written whole, sealed with digests and verified.

The modules, in reading order:

    manifest     name, length and digest of every file in a directory
    directories  directories that are whole or absent, and the checkpoints of a run
    lock         the lock that lets one process write into the folder of a run
    opening      the kind of a file or directory, told before it is read
    pairing      the check that a tokenizer belongs to its weights
    quantized    a quantized model on disk
    checkpoint   a model and its tokenizer on disk, and `load`
"""
