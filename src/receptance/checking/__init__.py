"""Looking at what lies on disk, and proving that a model computes what it should.

The modules, in reading order:

    contents     what a path holds, in whatever format
    inspecting   its figures, without running a model
    recorded     what a model said, in a file for other machines
    verifying    parallel, recurrent, batched, every kernel: the same logits
"""
