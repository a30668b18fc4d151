"""Checks of generated volumes, for rejection sampling."""
