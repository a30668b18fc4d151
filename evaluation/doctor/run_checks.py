"""Check a run's settings before it starts (its length, its precision, and what its output folder already holds), and
what it reported (metrics.jsonl) after it."""

from collections.abc import Sequence
from pathlib import Path

from evaluation.report import read_config
from training import TrainLdmConfig, TrainVaeConfig
from training.engine.checkpoints import list_checkpoints
from training.engine.run import CHECKPOINTS
from training.engine.tracking import JsonTracker
from training.vae_losses import WATCHED, DiscriminatorWatch

from .cases import Examined, Finding, fail, ok, warn

# Optimizer steps from random weights, below which results are hardly usable: 800 steps of a U-Net gave a cloud
# (configs/sarcoma), and the shipped ones took 3,600 to 6,000; the shipped autoencoders took 800 to 2,600.
FEW_STEPS = {TrainVaeConfig: 500, TrainLdmConfig: 1500}
PASSES = 10  # times that a run should see each training volume
SKIPPED = 0.02  # fraction of the steps; fp16 skips a few while it finds its loss scale


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


def latents_setting(folder: Path) -> str | None:
    """Return `latents` in the config of the run that wrote `folder`; None where nothing says it."""
    config = folder.resolve().parent / "config.yaml"
    return read_config(config).get("latents") if config.is_file() else None


def check_log(folder: Path) -> list[Finding]:
    """Check what the run that wrote `folder` reported: skipped steps, and the discriminator's loss at the end. No
    finding for a folder without its run's metrics.jsonl, such as shipped weights."""
    log = folder.resolve().parent / JsonTracker.file
    if not log.is_file():
        return []
    reported: dict[str, list[tuple[int, float]]] = {"skipped_steps": [], "discriminator": []}
    for step, key, value in JsonTracker(log.parent).parse(log.read_text("utf-8", "replace")):
        kind, _, name = key.partition("/")
        if kind == "train" and name in reported and isinstance(value, int | float):
            reported[name].append((step, float(value)))
    findings = []
    if reported["skipped_steps"]:
        step, skipped = reported["skipped_steps"][-1]
        text = f"{skipped:.0f} of {step:,} steps were skipped, because a loss or gradient was not finite"
        remedy = "set loop.mixed_precision: no, or lower optimizer.learning_rate; the run's messages name the samples"
        findings.append(warn("skipped", text, remedy) if skipped > SKIPPED * step else ok("skipped", text))
    if losses := [loss for _, loss in reported["discriminator"][-WATCHED:]]:
        watch = DiscriminatorWatch()
        fault = next((told for told in map(watch, losses) if told), None)
        text = f"its loss was {min(losses):.3g} to {max(losses):.3g} in the last {len(losses)} reports"
        findings.append(ok("discriminator", text) if fault is None else _told("discriminator", fault))
    return findings


def _told(check: str, warning: str) -> Finding:
    """Return a warning of the training as a finding: what is wrong, and what to do."""
    message, _, remedy = warning.partition(". ")
    return warn(check, message, remedy[0].lower() + remedy[1:])


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
