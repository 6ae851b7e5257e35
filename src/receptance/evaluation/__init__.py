"""How good a model is: likelihoods of texts, benchmarks, comparisons with Transformers."""
