"""Look a data set and a training config over, before the training and after it:

python -m evaluation.doctor --config configs/hippocampus/ldm.yaml [--output out/doctor.json]
python -m evaluation.doctor --config configs/hippocampus/ldm.yaml --pipeline weights/hippocampus

Prints a line for each check: OK, WARN (look at it) or FAIL (training would stop, or its figures would be worthless), with
the files it is about and a remedy. Ends with status 1 if a check failed. `--data.root DIR` and the like override the
config's section `data`.

python -m evaluation.doctor --config configs/real_sizes/ct/ldm_24gb.yaml --shape 256 256 256 [--dry_run]

says what training and generation need in memory for volumes of that size, without any data.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from cli.command import run_command
from cli.settings import Number, PositiveFloat, PositiveInt
from evaluation.report import config_parser


def parse(args: list[str] | None) -> Namespace:
    """The command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.doctor", __doc__, args)
    parser.add_argument(
        "--pipeline", type=str, help="after training: folder of the pipeline, or of the autoencoder alone"
    )
    parser.add_argument(
        "--volumes", type=Number(PositiveInt), default=8, help="real volumes that generated ones are compared with"
    )
    parser.add_argument("--steps", type=Number(PositiveInt), default=20, help="denoising steps")
    parser.add_argument(
        "--shape",
        type=str,
        nargs="+",
        help="only how much memory volumes of so many voxels take, such as 256 256 128; needs no data",
    )
    parser.add_argument("--dry_run", action="store_true", help="with --shape: run one step of each stage, and measure")
    parser.add_argument(
        "--memory", type=Number(PositiveFloat), help="with --shape: GiB of the accelerator that is planned for"
    )
    parser.add_argument(
        "--precision", type=Literal["no", "bf16", "fp16"], help="with --shape: of training; default: the config's"
    )
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: the accelerator if there is one")
    parser.add_argument("--output", type=str, help="report to write, a JSON file")
    parsed = parser.instantiate(parser.parse_args(args))
    if parsed.shape:
        sides = re.sub(r"[\[\](),]", " ", " ".join(parsed.shape)).split()
        if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
            parser.error(f"--shape {' '.join(parsed.shape)}: give voxels along X, Y and Z, such as 256 256 128")
        parsed.shape = tuple(map(int, sides))
    if parsed.shape and parsed.pipeline:
        parser.error("--shape looks at no data: leave out --pipeline")
    if (parsed.dry_run or parsed.precision or parsed.memory is not None) and not parsed.shape:
        parser.error("--dry_run, --memory and --precision need --shape, the size of the volumes")
    assert isinstance(parsed, Namespace)
    return parsed


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np

from cli.live_bar import LiveBar
from evaluation.data.seen import read_test_cases
from evaluation.report import (
    check_report,
    provenance,
    read_config,
    write_report,
)
from files.paths import printable
from pipelines import MedVolumePipeline
from pipelines.storage.loading import find_autoencoder, load_autoencoder
from volumes import Case, DataConfig, VolumeDataset
from volumes.data.table_conditions import describe_numbers
from volumes.devices import find_device

from .after_training import (
    check_latents,
    check_limits,
    compare_limits,
    latent_summary,
)
from .cases import (
    Examined,
    Finding,
    examine_cases,
    fail,
    find_cases,
    warn,
)
from .data_checks import (
    check_conditions,
    check_crops,
    check_found,
    check_geometry,
    check_intensity,
    check_labels,
    check_padding,
    check_size,
)
from .leaks import check_leaks
from .limits import check_evaluation
from .models import (
    Run,
    build_models,
    check_fit,
    check_settings,
    estimate,
    plan,
)
from .overlap import overlap_findings
from .start import advise_start


def main(args: list[str] | None = None) -> int:
    """Check as the command line says, print and write what was found. Returns 1 if a check failed, else 0."""
    options = parse(args)
    config: DataConfig = options.data
    sections = read_config(Path(options.config))
    folder = Path(options.config).parent
    if options.output:
        check_report(options.output)
    if options.pipeline:
        find_autoencoder(options.pipeline)  # or it is refused before the work
    if options.shape:
        device = find_device(options.device)
        findings, measured = check_settings(sections), {}
        if not findings:
            run = Run.of(sections, options.precision, accelerator=options.memory is not None)
            asked = {"memory": options.memory, "dry_run": options.dry_run, "device": device}
            findings, measured = plan(config, sections, run, options.shape, folder, **asked)
    else:
        findings, measured = before_training(config, sections, folder)
    if options.pipeline and not any(one.level == "FAIL" and one.check in ("files", "splits") for one in findings):
        try:
            found, more = after_training(config, Path(options.pipeline), options.volumes, options.steps, options.device)
        except ValueError as error:  # what was found of the data is not to be lost by it
            found, more = [fail("model", str(error), "give a pipeline or an autoencoder that can be loaded")], {}
        findings, measured = findings + found, {**measured, **more}
    for finding in findings:
        print(printable(str(finding)))
    counts = {level: sum(one.level == level for one in findings) for level in ("OK", "WARN", "FAIL")}
    print(", ".join(f"{count} {level}" for level, count in counts.items()))
    if options.output:
        report = {
            "evaluation": "doctor",
            "counts": counts,
            "findings": [asdict(one) for one in findings],
            **measured,
            "data": asdict(config),
            **provenance(),
        }
        print(f"report: {write_report(options.output, report)}")
    return 1 if counts["FAIL"] else 0


def before_training(config: DataConfig, sections: dict[str, Any], folder: Path) -> tuple[list[Finding], dict[str, Any]]:
    """All that can be known of data and config without a trained model: findings, and figures for the report."""
    cases, findings = find_cases(config)
    if not cases:
        return findings, {}
    with LiveBar(total=len(cases), unit="volume", disable=None, desc="examining") as progress:
        examined, refused = examine_cases(cases, config, lambda name: progress.update())
    findings += check_found(cases, examined, refused, config)
    if not examined:
        return findings, {}
    findings += check_leaks(examined) + check_geometry(examined, config) + check_intensity(examined, config)
    model = sections.get("model")
    dropout = model.get("condition_dropout") if isinstance(model, dict) else None
    findings += check_labels(examined)
    findings += check_conditions(examined, config, dropout if isinstance(dropout, dict) else {})
    findings += check_evaluation(examined, config)
    found, measured = check_model(examined, config, sections, folder)
    for path in dict.fromkeys(str(sections[key]) for key in ("vae", "init_from") if sections.get(key)):
        if Path(path).exists():  # else that it is missing is said above
            voxels = {one.case.name: one.voxels for one in examined}
            spacings = [one.spacing for one in examined] if config.spacing is None else None
            found += overlap_findings(path, [one.case for one in examined], config, voxels, spacings)
    rows = [
        {
            "name": one.case.name,
            "subject": one.case.subject,
            "split": one.case.split,
            "shape": one.shape,
            "spacing": one.spacing,
            "orientation": one.orientation,
            "low": one.low,
            "high": one.high,
            "step": one.step,
            "labels_ml": one.labels,
        }
        for one in examined
    ]
    return findings + found, {**measured, "volumes": rows}


def check_model(
    examined: Sequence[Examined], config: DataConfig, sections: dict[str, Any], folder: Path
) -> tuple[list[Finding], dict[str, Any]]:
    """The model section built and run without numbers: crops, padding, memory; and what a small set may start from."""
    latent = "vae" in sections
    if wrong := check_settings(sections):
        return [*wrong, *check_size(examined, None, latent)], {}
    if not sections.get("model"):
        missing = "the config has no section `model`: memory is not estimated"
        return [*check_size(examined, None, latent), warn("model", missing, "give a training config")], {}
    train = [one.numbers for one in examined if one.case.split == "train"]
    numbers = describe_numbers(config.numbers, train) if config.numbers else {}
    try:
        models, findings = build_models(sections, config, numbers, folder)
    except (TypeError, ValueError, KeyError) as error:
        return [fail("model", f"cannot be built: {error}", "correct the section `model`, or `vae`")], {}
    vae, run = models.vae, Run.of(sections)
    start = (
        None if latent or sections.get("init_from") else advise_start(vae, config, [one.spacing for one in examined])
    )
    findings += check_size(examined, start, latent)
    if wrong := check_fit(models, run, config):
        return [*findings, *wrong], {}
    findings += check_padding(examined, vae.stride)
    if models.unet is None and list(vae.parameters()):
        findings += check_crops(examined, run.crops.shape, vae.stride)
    found, measured = estimate(models, run, [one.model_shape for one in examined], config)
    return findings + found, measured


def after_training(
    config: DataConfig, folder: Path, volumes: int, steps: int, device: str | None
) -> tuple[list[Finding], dict[str, Any]]:
    """Latents of the training volumes, and of a whole pipeline what limits its quality on real test volumes."""
    on = find_device(device)
    cases, _ = find_cases(config)
    lenient = replace(config, on_error="skip")  # what is refused was named before
    split = {name: [case for case in cases if case.split == name] for name in ("train", "test")}
    vae = load_autoencoder(folder).to(on)  # pyright: ignore[reportArgumentType]
    train = VolumeDataset(split["train"], lenient)
    with LiveBar(total=len(train), unit="volume", disable=None, desc="encoding training volumes") as progress:
        summary = latent_summary(vae, train, lambda name: progress.update())
    voxels, spacings = read_test_cases(cases, config)
    findings = overlap_findings(folder, cases, config, voxels, spacings if config.spacing is None else None)
    findings, measured = findings + check_latents(summary), {"latents": summary}
    if not (folder / "model_index.json").is_file():
        return findings, measured
    if not split["test"]:
        remedy = "hold some out (data.test_fraction)"
        return [*findings, warn("quality", "no test volume to compare generated ones with", remedy)], measured
    pipe: Any = MedVolumePipeline.from_pretrained(folder)
    pipe.to(on)
    pipe.set_progress_bar_config(disable=True)
    judged, floor = (VolumeDataset(_spread(split[name], volumes), lenient) for name in ("test", "train"))
    with LiveBar(total=len(judged), unit="volume", disable=None, desc="reconstructing and generating") as progress:
        try:
            limits = compare_limits(pipe, judged, floor, steps=steps, on_volume=lambda name: progress.update())
        except ValueError as error:
            return [
                *findings,
                warn("quality", f"not judged: {error}", "judge it with generate.py and evaluate.py"),
            ], measured
    return findings + check_limits(limits, len(judged)), {**measured, "quality": limits}


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` cases, evenly spread over the list."""
    chosen = np.unique(np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int))
    return [cases[i] for i in chosen]
