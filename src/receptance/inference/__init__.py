"""Running a model on text: reading prompts, sampling, batching, generation, scoring.

The modules, in reading order:

    sampling     logits to token ids
    steering     biases and constraints of single requests
    streaming    token ids to the text that is certain, and where it stops
    rows         one text that is being continued
    reading      pieces of several texts through an engine
    batching     many texts continued together in fixed slots
    generation   one call for a few prompts
    scoring      how well a model predicts text
    measure      how fast a model runs on this machine
    transfer     tensors from the host to a device without waiting
    defaults     None as the value of an option
"""
