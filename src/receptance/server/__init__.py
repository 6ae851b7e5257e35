"""An HTTP server for models: OpenAI's and Anthropic's interfaces over one engine thread.

The modules, in reading order:

    cache        the states behind beginnings of texts
    shelf        snapshots of states as files
    queue        who is served next
    jobs         what the engine is asked for, and what it answers
    readings     prompts whose positions are looked at: log-probabilities, embeddings
    scheduler    jobs through an engine, step by step
    thread       the one thread that does it
"""
