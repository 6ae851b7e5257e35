"""A model from one format into another, and the proof that it is the same.

The modules, in reading order:

    source       a model on disk in any format, mapped a piece at a time
    target       what is to be written, and where
    comparing    the same logits, the same tensors
    converting   write, read back, compare, and only then give it its name
"""
