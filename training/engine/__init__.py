"""The training loop: steps, averages, checkpoints, processes. Imports files, cli and volumes only, and no model."""
