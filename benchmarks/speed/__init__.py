"""Timings beside peers: `python -m benchmarks.speed.run`."""
