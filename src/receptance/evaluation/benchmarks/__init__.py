"""Benchmarks of the field, through lm-evaluation-harness and alone, over any engine."""
