"""Inspecting models on disk, and checking that a model computes what it should.

The modules, in reading order:

    contents     what a path holds, in any format
    inspecting   the figures of weights, without running a model
    recorded     files of logits that other machines compare their own with
    verifying    whether every form of the model and every kernel give the same logits
"""
