"""Metrics of volumes and of sets of volumes."""
