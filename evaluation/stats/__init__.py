"""Intervals over subjects and seeds."""
