"""Writing a model in another format, and proving that it is still the same model.

The modules, in reading order:

    source       a model on disk in any format, mapped a piece at a time
    target       the file or directory to write, its format and type of weights
    comparing    whether two sets of weights give the same logits and are the same tensors
    converting   writing a model, reading it back and comparing it before it gets its name
"""
