"""Train a latent diffusion model:  accelerate launch train_ldm.py --config configs/hippocampus/ldm.yaml [--vae DIR ...]

The run folder ends with `pipeline/`: autoencoder, U-Net (averaged weights), scheduler and the description of the
training data, for `MedVolumePipeline.from_pretrained`. With a `lora:` section it ends with `lora/` instead, for
`pipe.load_lora_weights`: --config configs/hippocampus/lora.yaml --init_from PIPELINE/unet --vae PIPELINE/vae
"""

from cli.command import run_command
from training.engine.config import parse_config
from training.ldm_config import TrainLdmConfig

if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse_config(TrainLdmConfig))

from training.engine.run import run_training
from training.ldm import build


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train as the command line says. Returns the metrics of the final validation."""
    return run_training(parse_config(TrainLdmConfig, args), build, "train_ldm.py", args)
