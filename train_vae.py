"""Train an autoencoder:  accelerate launch train_vae.py --config configs/hippocampus/vae.yaml [--loop.seed 1 ...]

The run folder ends with `vae/`: the averaged weights, with the latents' mean and standard deviation over the training
set in its config. An autoencoder without parameters (autoencoder.SpaceToDepth3D) is measured and saved at once.
"""

from cli.command import next_step, run_command


def parse(args: list[str] | None = None) -> "TrainVaeConfig":
    """The settings of the command line; imported here, so that Ctrl-C ends with one line from the start."""
    from training.engine.config import parse_config
    from training.vae_config import TrainVaeConfig

    return parse_config(TrainVaeConfig, args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(parse)

from pathlib import Path

from training.engine.run import run_training
from training.vae import build
from training.vae_config import TrainVaeConfig
from volumes.data.config_parser import config_files


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train as the command line says, and print the command that comes next. Returns the metrics of the final
    validation."""
    config = parse(args)
    metrics = run_training(config, build, "train_vae.py", args)
    for file in config_files(args, TrainVaeConfig)[-1:]:
        if (following := file.path.with_name("ldm.yaml")).is_file():
            next_step("train_ldm.py", "--config", following, "--vae", Path(config.output) / "vae")
    return metrics
