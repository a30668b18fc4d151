"""Train an autoencoder:  accelerate launch train_vae.py --config configs/hippocampus/vae.yaml [--loop.seed 1 ...]

The run folder ends with `vae/`: the averaged weights, with the latents' mean and standard deviation over the training
set in its config. An autoencoder without parameters (autoencoder.SpaceToDepth3D) is measured and saved at once.
"""

from cli.command import run_command
from training.engine.config import parse_config
from training.vae_config import TrainVaeConfig

if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse_config(TrainVaeConfig))

from training.engine.run import run_training
from training.vae import build


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train as the command line says. Returns the metrics of the final validation."""
    return run_training(parse_config(TrainVaeConfig, args), build, "train_vae.py", args)
