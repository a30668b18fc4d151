"""Check a run's settings before it starts: its length, its precision, and what its output folder already holds."""

from collections.abc import Sequence
from pathlib import Path

from training import TrainLdmConfig, TrainVaeConfig
from training.engine.checkpoints import list_checkpoints
from training.engine.run import CHECKPOINTS

from .cases import Examined, Finding, fail, ok, warn

# Optimizer steps from random weights, below which results are hardly usable: 800 steps of a U-Net gave a cloud
# (configs/sarcoma), and the shipped ones took 3,600 to 6,000; the shipped autoencoders took 800 to 2,600.
FEW_STEPS = {TrainVaeConfig: 500, TrainLdmConfig: 1500}
PASSES = 10  # times that a run should see each training volume


def check_run(config: TrainVaeConfig | TrainLdmConfig, examined: Sequence[Examined]) -> list[Finding]:
    """Check the length and the precision of a run. `config.loop.mixed_precision` is resolved."""
    return [*_length(config, sum(item.case.split == "train" for item in examined)), *_precision(config)]


def check_output(output: str) -> list[Finding]:
    """Report a run that the output folder already holds."""
    checkpoints = list_checkpoints(Path(output) / CHECKPOINTS)
    if not checkpoints:
        return []
    remedy = (
        "continue it with --resume latest, which refuses other settings and volumes; or choose another --output, with "
        "--init_from to start from its weights"
    )
    return [warn("output", f"{output} already holds a run, up to {checkpoints[-1].name}", remedy)]


def _length(config: TrainVaeConfig | TrainLdmConfig, volumes: int) -> list[Finding]:
    """Compare the steps with what models took so far, and with the number of training volumes."""
    if not volumes:
        return []
    steps = config.loop.max_steps
    samples = steps * config.loop.batch_size * config.optimizer.gradient_accumulation
    what = "patches" if isinstance(config, TrainVaeConfig) else "latents"
    text = f"{steps:,} steps in one process see {samples / volumes:,.1f} {what} of each of {volumes} training volumes"
    few = FEW_STEPS[type(config)]
    if steps < few and not config.init_from:
        remedy = f"raise loop.max_steps to {few:,} or more, or start from trained weights (--init_from DIR)"
        return [warn("length", f"{text}: too few steps for random weights", remedy)]
    if samples < PASSES * volumes:
        return [
            warn("length", f"{text}: too few", "raise loop.max_steps or loop.batch_size, or train in more processes")
        ]
    return [ok("length", text)]


def _precision(config: TrainVaeConfig | TrainLdmConfig) -> list[Finding]:
    if config.loop.mixed_precision != "fp16":
        return []
    remedy = "set loop.mixed_precision: auto (bf16 where the hardware has it, else float32)"
    if isinstance(config, TrainVaeConfig) and config.adversarial is not None:
        return [fail("precision", "fp16 with a discriminator is not supported", remedy)]
    return [warn("precision", "fp16 cannot hold values above 65,504, so losses may become NaN", remedy)]
