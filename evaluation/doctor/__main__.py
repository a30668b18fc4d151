"""Check a data set and a training config, before the training and after it:

python -m evaluation.doctor --config configs/hippocampus/ldm.yaml [--output out/doctor.json]
python -m evaluation.doctor --config configs/hippocampus/ldm.yaml --pipeline weights/hippocampus

Prints a line per check: OK, WARN (look at it) or FAIL (training would stop, or its results would be worthless), with
the files it is about and a remedy. The exit status is 1 if a check failed. `--data.root DIR` and the like override the
config's section `data`.

python -m evaluation.doctor --config configs/real_sizes/ct/ldm_24gb.yaml --shape 256 256 256 [--dry_run]

estimates the memory of training and generation for volumes of that size, without any data.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from cli.command import run_command
from cli.settings import Number, PositiveFloat, PositiveInt
from evaluation.report import config_parser


def parse(args: list[str] | None) -> Namespace:
    """Parse the command line; the data section of `--config` gives the defaults of `--data.*`."""
    parser = config_parser("evaluation.doctor", __doc__, args)
    parser.add_argument(
        "--pipeline", type=str, help="after training: folder of the pipeline, or of the autoencoder alone"
    )
    parser.add_argument(
        "--volumes", type=Number(PositiveInt), default=8, help="real volumes to compare generated ones with"
    )
    parser.add_argument("--steps", type=Number(PositiveInt), default=20, help="denoising steps")
    parser.add_argument(
        "--shape",
        type=str,
        nargs="+",
        help="only estimate the memory for volumes of this size, such as 256 256 128; needs no data",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="with --shape: run one step of each stage and measure its memory"
    )
    parser.add_argument("--memory", type=Number(PositiveFloat), help="with --shape: GiB of the accelerator to plan for")
    parser.add_argument(
        "--precision",
        type=Literal["no", "bf16", "fp16"],
        help="with --shape: precision of training; default: the config's",
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
        parser.error("--shape reads no data; remove --pipeline")
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
from training.vae_config import TrainVaeConfig
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
from .headers import (
    CaseSize,
    Forecast,
    describe_sizes,
    examined_at_once,
    read_sizes,
)
from .leaks import check_leaks
from .limits import check_evaluation
from .models import (
    build_models,
    check_fit,
    check_settings,
    config_from_sections,
    estimate,
    known_numbers,
    model_section,
    plan,
    with_precision,
)
from .overlap import overlap_findings
from .run_checks import check_log, check_output, check_run, latents_setting
from .start import advise_start

Checks = tuple[list[Finding], Mapping[str, object]]  # findings, and values for the report


def main(args: list[str] | None = None) -> int:
    """Check as the command line says, print the findings and write the report. Returns 1 if a check failed, else 0."""
    options = parse(args)
    config: DataConfig = options.data
    sections = read_config(Path(options.config))
    folder = Path(options.config).parent
    if options.output:
        check_report(options.output)
    if options.pipeline:
        find_autoencoder(options.pipeline)  # an unusable folder is refused before the work
    if options.shape:
        device = find_device(options.device)
        findings, measured = check_settings(sections), {}
        if not findings:
            training = config_from_sections(sections, config)
            training = with_precision(training, options.precision, accelerator=options.memory is not None)
            findings, measured = plan(
                training, options.shape, folder, memory=options.memory, dry_run=options.dry_run, device=device
            )
    else:
        findings, measured = before_training(config, sections, folder)
        if not options.pipeline and isinstance(sections.get("output"), str):
            findings += check_output(sections["output"])
    unusable = any(finding.level == "FAIL" and finding.check in ("files", "splits") for finding in findings)
    if options.pipeline and not unusable:
        try:
            found, more = after_training(config, Path(options.pipeline), options.volumes, options.steps, options.device)
        except ValueError as error:  # the findings about the data must not be lost
            found, more = [fail("model", str(error), "give a pipeline or an autoencoder that can be loaded")], {}
        findings, measured = findings + found, {**measured, **more}
    for finding in findings:
        print(printable(str(finding)))
    counts = {level: sum(finding.level == level for finding in findings) for level in ("OK", "WARN", "FAIL")}
    print(", ".join(f"{count} {level}" for level, count in counts.items()))
    if options.output:
        report = {
            "evaluation": "doctor",
            "counts": counts,
            "findings": [asdict(finding) for finding in findings],
            **measured,
            "data": asdict(config),
            **provenance(),
        }
        print(f"report: {write_report(options.output, report)}")
    return 1 if counts["FAIL"] else 0


def before_training(config: DataConfig, sections: Mapping[str, Any], folder: Path) -> Checks:
    """Check data and config, without a trained model: findings, and values for the report."""
    cases, findings = find_cases(config)
    if not cases:
        return findings, {}
    examined, refused = examine_all(cases, config)
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
        if Path(path).exists():  # otherwise a finding above says that it is missing
            voxels = {item.case.name: item.voxels for item in examined}
            spacings = [item.spacing for item in examined] if config.spacing is None else None
            found += overlap_findings(path, [item.case for item in examined], config, voxels, spacings)
    rows = [
        {
            "name": item.case.name,
            "subject": item.case.subject,
            "split": item.case.split,
            "shape": item.shape,
            "spacing": item.spacing,
            "orientation": item.orientation,
            "low": item.low,
            "high": item.high,
            "step": item.step,
            "labels_ml": item.labels,
        }
        for item in examined
    ]
    return findings + found, {**measured, "volumes": rows}


def examine_all(cases: Sequence[Case], config: DataConfig) -> tuple[list[Examined], list[tuple[Case, str]]]:
    """Read the headers of all cases, say what reading the voxels takes, and examine them (`examine_cases`)."""
    sizes: list[CaseSize] = []
    if config.phantom is None:
        with LiveBar(total=len(cases), unit="case", disable=None, delay=2, desc="reading headers") as progress:
            sizes = read_sizes(cases, lambda name: progress.update())
        print(describe_sizes(sizes), flush=True)
    with LiveBar(total=len(cases), unit="volume", disable=None, desc="examining") as progress:
        forecast = Forecast(sizes or [CaseSize(0, None)] * len(cases), progress.write, time.monotonic)

        def on_case(name: str) -> None:
            progress.update()
            forecast.case_done()

        return examine_cases(cases, config, on_case, at_once=examined_at_once(sizes))


def check_model(examined: Sequence[Examined], config: DataConfig, sections: Mapping[str, Any], folder: Path) -> Checks:
    """Build the model section and run it without values: patches, padding, memory; and the weights a small set may
    start from."""
    latent = "vae" in sections
    if wrong := check_settings(sections):
        return [*wrong, *check_size(examined, None, latent)], {}
    if not model_section(sections):
        missing = "the config has no section `model`, so memory is not estimated"
        return [*check_size(examined, None, latent), warn("model", missing, "give a training config")], {}
    train = [item.numbers for item in examined if item.case.split == "train"]
    try:
        numbers = describe_numbers(config.numbers, train, known_numbers(sections)) if config.numbers else {}
    except ValueError as error:
        return [
            *check_size(examined, None, latent),
            fail("model", f"cannot be built: {error}", "correct data.numbers"),
        ], {}
    try:
        models, findings = build_models(with_precision(config_from_sections(sections, config)), numbers, folder)
    except (TypeError, ValueError, KeyError) as error:
        return [fail("model", f"cannot be built: {error}", "correct the section `model`, or `vae`")], {}
    vae = models.vae
    start = None
    if not latent and not sections.get("init_from"):
        start = advise_start(vae, config, [item.spacing for item in examined])
    findings += check_size(examined, start, latent)
    if models.step is not None:
        findings += check_run(models.config, examined)
    if faults := check_fit(models):
        return [*findings, *faults], {}
    findings += check_padding(examined, vae.stride)
    if isinstance(models.config, TrainVaeConfig) and models.step is not None:
        findings += check_crops(examined, models.config.crops.shape, vae.stride)
    found, measured = estimate(models, [item.model_shape for item in examined])
    return findings + found, measured


def after_training(config: DataConfig, folder: Path, volumes: int, steps: int, device: str | None) -> Checks:
    """Check the latents of the training volumes, and, for a pipeline, what limits its quality on real test volumes."""
    on = find_device(device)
    cases, _ = find_cases(config)
    lenient = replace(config, on_error="skip")  # findings above name the files that are refused
    split = {name: [case for case in cases if case.split == name] for name in ("train", "test")}
    vae = load_autoencoder(folder).to(on)  # pyright: ignore[reportArgumentType]
    train = VolumeDataset(split["train"], lenient)
    with LiveBar(total=len(train), unit="volume", disable=None, desc="encoding training volumes") as progress:
        summary = latent_summary(vae, train, lambda name: progress.update())
    voxels, spacings = read_test_cases(cases, config)
    findings = overlap_findings(folder, cases, config, voxels, spacings if config.spacing is None else None)
    sampled = (latents_setting(folder) or vae.latents_for_training) == "sample"
    findings, measured = findings + check_latents(summary, sampled) + check_log(folder), {"latents": summary}
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
                warn("quality", f"not measured: {error}", "measure it with generate.py and evaluate.py"),
            ], measured
    return findings + check_limits(limits, len(judged)), {**measured, "quality": limits}


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    """Return `count` cases, evenly spread over the list."""
    indices = np.unique(np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int))
    return [cases[i] for i in indices]
