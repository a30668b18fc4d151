"""The training loop: steps, averages, checkpoints, processes. It knows no model."""
