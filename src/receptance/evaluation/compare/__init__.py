"""RWKV against Transformers of the same size, trained in the same way on the same text.

The modules, in reading order:

    options     what is compared
    families    the architectures, each with all that the comparison asks of it
    baselines   those of transformers
    table       all of them by name
    matching    parameters and FLOPs, counted alike, and sizes that make them equal
    runs        one training run, and the file with what it found
    training    the loop that trains any of them
    costs       seconds of a step, seconds and memory per generated token at each context
    comparing   all runs: the search for learning rates, the seeds, the result
    findings    a result made of what the runs found
    estimating  how long all of it takes
"""
