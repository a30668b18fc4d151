"""Timings, each a script: `python -m benchmarks.generation`."""
