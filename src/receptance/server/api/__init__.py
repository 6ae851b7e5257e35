"""The endpoints: each module has the structs of its requests and answers, and what makes one of the
other.

    options        what all requests for text have in common
    tokens         tokens and their probabilities, as the interfaces write them
    completions    /v1/completions
    chat           /v1/chat/completions
    responses      /v1/responses
    messages       /v1/messages
    embeddings     /v1/embeddings
    about          models, tokenizers, health
"""
