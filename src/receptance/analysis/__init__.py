"""Looking inside a model: what it computes, reads from, remembers, and would say."""
