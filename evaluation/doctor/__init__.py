"""Checks before training: `python -m evaluation.doctor`."""
