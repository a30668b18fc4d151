"""Fingerprints of training volumes, and masks of nobody."""
