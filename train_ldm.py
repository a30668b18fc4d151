"""Train a latent diffusion model:  accelerate launch train_ldm.py --config configs/hippocampus/ldm.yaml [--vae DIR ...]

The run folder ends with `pipeline/`: autoencoder, U-Net (averaged weights), scheduler and the description of the
training data, for `MedVolumePipeline.from_pretrained`. With a `lora:` section it ends with `lora/` instead, for
`pipe.load_lora_weights`: --config configs/hippocampus/lora.yaml --init_from PIPELINE/unet --vae PIPELINE/vae
"""

from cli.command import next_step, run_command


def parse(args: list[str] | None = None) -> "TrainLdmConfig":
    """The settings of the command line; imported here, so that Ctrl-C ends with one line from the start."""
    from training.engine.config import parse_config
    from training.ldm_config import TrainLdmConfig

    return parse_config(TrainLdmConfig, args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(parse)

from collections.abc import Mapping
from pathlib import Path

from training.engine.run import run_training
from training.ldm import build
from training.ldm_config import TrainLdmConfig


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train as the command line says, and print the command that comes next. Returns the metrics of the final
    validation."""
    config = parse(args)
    metrics = run_training(config, build, "train_ldm.py", args)
    next_step("generate.py", *generation(config))
    return metrics


def generation(config: TrainLdmConfig) -> list[str | Path]:
    """Return arguments of generate.py for the model of a finished run: the held-out cases of its data. MASKS, in
    capitals, is for the user to fill in: phantoms have no files."""
    output, model, data = Path(config.output), config.model, config.data
    words: list[str | Path] = []
    if config.lora is not None:
        words = ["--pipeline", Path(config.init_from or "").parent, "--lora", output / "lora"]
    elif data.phantom is not None or not is_conditional(model):
        words = ["--pipeline", output / "pipeline"]
    if is_conditional(model) and data.phantom is None:
        held_out = data.split or data.test_fraction
        split = "test" if held_out else "validation" if data.validation_fraction else "train"
        words += ["--config", output / "config.yaml", "--split", split]
    elif model.get("num_labels"):
        words += ["--masks", "MASKS"]
    elif is_conditional(model):
        words += ["--conditions", "TABLE"]
    return [*words, "--output", output / "generated"]


def is_conditional(model: Mapping[str, object]) -> bool:
    """Return whether a U-Net with these arguments is conditioned on masks, classes, numbers or images."""
    return any(model.get(kind) for kind in ("num_labels", "classes", "numbers", "images"))
