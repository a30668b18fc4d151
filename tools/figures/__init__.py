"""Every figure of README, docs and model cards: how it is measured, and where it is written."""
