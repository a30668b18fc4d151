"""Benchmarks of what a training step learns: losses, timesteps, small structures, fine-tuning."""
