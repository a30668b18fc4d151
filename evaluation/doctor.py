"""Look a data set and a training config over, before the training and after it:

python -m evaluation.doctor --config configs/hippocampus/ldm.yaml [--output out/doctor.json]
python -m evaluation.doctor --config configs/hippocampus/ldm.yaml --pipeline weights/hippocampus

Prints a line for each check: OK, WARN (look at it) or FAIL (training would stop, or its figures would be worthless), with
the files it is about and a remedy. Ends with status 1 if a check failed. `--data.root DIR` and the like override the
config's section `data`.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from tqdm import tqdm

from autoencoder import AutoencoderKL3D, VolumeAutoencoder
from autoencoder.layers import as_stride
from diffusion import LatentUNet3D
from pipelines import MedVolumePipeline
from pipelines.loading import load_autoencoder
from volumes import PHANTOM_LABELS, Case, DataConfig, VolumeDataset
from volumes.conditions import describe_numbers

from .doctor_cases import Examined, Finding, examine_cases, fail, find_cases, ok, warn
from .doctor_data import (
    check_conditions,
    check_crops,
    check_found,
    check_geometry,
    check_intensity,
    check_labels,
    check_padding,
    check_size,
)
from .doctor_leaks import check_leaks
from .doctor_memory import (
    GIB,
    autoencoder_step,
    dataset_bytes,
    generation_bytes,
    told,
    training_bytes,
    unet_step,
)
from .doctor_model import check_latents, check_limits, compare_limits, latent_summary
from .report import config_parser, provenance, read_config, write_report

BATCH_SIZE, CROP = 4, (32, 32, 32)  # defaults of a training config's `loop` and `crops`
GENERATION_BATCH = 8  # of the pipeline
FULL = 0.8  # of the memory, above which an estimate is a warning


def main(args: list[str] | None = None) -> int:
    """Check as the command line says, print and write what was found. Returns 1 if a check failed, else 0."""
    options = parse(args)
    config: DataConfig = options.data
    sections = read_config(Path(options.config))
    findings, measured = before_training(config, sections)
    if options.pipeline and not any(one.level == "FAIL" and one.check in ("files", "splits") for one in findings):
        found, more = after_training(config, Path(options.pipeline), options.volumes, options.steps, options.device)
        findings, measured = findings + found, {**measured, **more}
    for finding in findings:
        print(finding)
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


def parse(args: list[str] | None) -> Namespace:
    """The command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.doctor", __doc__, args)
    parser.add_argument(
        "--pipeline", type=str, help="after training: folder of the pipeline, or of the autoencoder alone"
    )
    parser.add_argument("--volumes", type=int, default=8, help="real volumes that generated ones are compared with")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: the accelerator if there is one")
    parser.add_argument("--output", type=str, help="report to write, a JSON file")
    parsed = parser.instantiate(parser.parse_args(args))
    assert isinstance(parsed, Namespace)
    return parsed


def before_training(config: DataConfig, sections: dict[str, Any]) -> tuple[list[Finding], dict[str, Any]]:
    """All that can be known of data and config without a trained model: findings, and figures for the report."""
    cases, findings = find_cases(config)
    if not cases:
        return findings, {}
    with tqdm(total=len(cases), unit="volume", disable=None, desc="examining") as progress:
        examined, refused = examine_cases(cases, config, lambda name: progress.update())
    findings += check_found(cases, examined, refused, config) + check_size(cases)
    if not examined:
        return findings, {}
    findings += check_leaks(examined) + check_geometry(examined, config) + check_intensity(examined, config)
    dropout = (sections.get("model") or {}).get("condition_dropout") or {}
    findings += check_labels(examined) + check_conditions(examined, config, dropout)
    found, measured = check_model(examined, config, sections)
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
    examined: Sequence[Examined], config: DataConfig, sections: dict[str, Any]
) -> tuple[list[Finding], dict[str, Any]]:
    """The model section built and run without numbers: crops, padding, memory."""
    section = dict(sections.get("model") or {})
    if not section:
        return [
            warn("model", "the config has no section `model`: memory is not estimated", "give a training config")
        ], {}
    findings: list[Finding] = []
    unet = None
    try:
        if _class_of(section) is LatentUNet3D:
            vae, told_vae = _autoencoder_for(sections, config)
            findings += told_vae
            unet = LatentUNet3D(**{**_decided(vae, examined, config), **_arguments(section)})
        else:
            vae = _class_of(section)(**_arguments(section))
    except (TypeError, ValueError, KeyError) as error:
        return [fail("model", f"cannot be built: {error}", "correct the section `model`, or `vae`")], {}
    channels = len(config.channels)
    if vae.config["in_channels"] != channels:
        remedy = f"set in_channels and out_channels of the autoencoder to {channels}"
        message = f"the autoencoder takes {vae.config['in_channels']} channels, the data has {config.channels}"
        return [*findings, fail("model", message, remedy)], {}
    batch = int((sections.get("loop") or {}).get("batch_size", BATCH_SIZE))
    crop = tuple(int(n) for n in (sections.get("crops") or {}).get("shape", CROP))
    findings += check_padding(examined, vae.stride)
    if unet is None:
        found = check_crops(examined, crop, vae.stride)
        findings += found
        if any(one.level == "FAIL" for one in found):
            return findings, {}
    return _estimate(findings, vae, unet, examined, config, crop, batch)


def _estimate(
    findings: list[Finding],
    vae: VolumeAutoencoder,
    unet: LatentUNet3D | None,
    examined: Sequence[Examined],
    config: DataConfig,
    crop: Sequence[int],
    batch: int,
) -> tuple[list[Finding], dict[str, Any]]:
    shapes = np.array([one.model_shape for one in examined])
    cells = -(-shapes // np.array(vae.stride))
    largest = cells[cells.prod(axis=1).argmax()]
    whole = tuple((largest * vae.stride).tolist())
    if unet is None:
        size = f"{batch} crops of {list(crop)}"
        training = training_bytes(vae, autoencoder_step(vae, crop, batch))
    else:
        size = f"{batch} latents of {largest.tolist()} cells, the largest volume's"
        training = training_bytes(unet, unet_step(unet, largest.tolist(), batch))
    generation = generation_bytes(vae, unet, whole, GENERATION_BATCH)
    masks = bool(config.masks or config.phantom)
    data = dataset_bytes(shapes.tolist(), len(config.channels), masks)
    machine, kind = _memory()
    denoised = (
        f"{GENERATION_BATCH} volumes of {list(whole)}, decoded one by one" if unet else f"a volume of {list(whole)}"
    )
    estimates = (
        ("training", training["total"], f"{size}, float32 without checkpointing or discriminator: {told(training)}",
         "lower loop.batch_size, or set gradient_checkpointing: true; bfloat16 takes about 0.6 of the step"),
        ("generation", generation["total"], f"{denoised}, float32: {told(generation)}",
         "lower batch_size of the call, or load in bfloat16"),
    )  # fmt: skip
    for what, size, assumed, remedy in estimates:
        text = f"{what} takes about {size / GIB:.2f} GiB of the {machine / GIB:.1f} GiB of this {kind} ({assumed} GiB)"
        findings.append(warn("memory", text, remedy) if size > FULL * machine else ok("memory", text))
    text = f"volumes in memory: {data / GIB:.2f} GiB in each process"
    if kind == "machine" and data + training["total"] > FULL * machine:
        findings.append(warn("memory", text, "set a coarser data.spacing, or use a larger machine"))
    else:
        findings.append(ok("memory", text))
    return findings, {"memory_bytes": {"training": training, "generation": generation, "volumes": data}}


def _memory() -> tuple[int, str]:
    """Bytes of memory of what would train here, and what that is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "accelerator"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"


def _class_of(section: dict[str, Any]) -> type:
    module, _, name = str(section.get("class", "")).rpartition(".")
    if module not in ("autoencoder", "diffusion"):
        raise ValueError(f"class {section.get('class')!r} is none of autoencoder. or diffusion.")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, (VolumeAutoencoder, LatentUNet3D))):
        raise ValueError(f"{module} has no model {name!r}")
    return found


def _arguments(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "class"}


def _autoencoder_for(sections: dict[str, Any], config: DataConfig) -> tuple[VolumeAutoencoder, list[Finding]]:
    """The autoencoder that the config names, with fresh weights; a default one where it is not trained yet."""
    folder = Path(str(sections.get("vae")))
    described = next((path for path in (folder, folder / "vae") if (path / "config.json").is_file()), None)
    if described is None:
        channels = len(config.channels)
        message = f"vae: {folder} is not there yet: a default autoencoder (4 latent channels, stride 4) is taken for it"
        apart = {"per_channel": True, "latent_channels": 4 * channels} if config.given else {}
        vae = AutoencoderKL3D(in_channels=channels, out_channels=channels, **apart)
        return vae, [warn("model", message, "run train_vae.py first, or correct `vae`")]
    stored = json.loads((described / "config.json").read_text())
    name = f"autoencoder.{stored['_class_name']}"
    arguments = {key: value for key, value in stored.items() if key[0] != "_"}
    return _class_of({"class": name})(**arguments), [ok("model", f"autoencoder of {described}")]


def _decided(vae: VolumeAutoencoder, examined: Sequence[Examined], config: DataConfig) -> dict[str, Any]:
    """What autoencoder and data say of a U-Net, as train_ldm.py completes it."""
    train = [one.numbers for one in examined if one.case.split == "train"]
    numbers = describe_numbers(config.numbers, train) if config.numbers else {}
    labels = config.label_names or (PHANTOM_LABELS if config.phantom else {})
    width = vae.config["latent_channels"] // max(vae.channels_apart, 1)
    return {
        "in_channels": vae.config["latent_channels"],
        "out_channels": vae.config["latent_channels"],
        "mask_stride": as_stride(vae.stride),
        "num_labels": len(labels) if config.masks or config.phantom else 0,
        "classes": config.classes or None,
        "numbers": {name: {key: of[key] for key in ("mean", "std")} for name, of in numbers.items()} or None,
        "images": dict.fromkeys(config.given, width) or None,
    }


def after_training(
    config: DataConfig, folder: Path, volumes: int, steps: int, device: str | None
) -> tuple[list[Finding], dict[str, Any]]:
    """Latents of the training volumes, and of a whole pipeline what limits its quality on real test volumes."""
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases, _ = find_cases(config)
    lenient = replace(config, on_error="skip")  # what is refused was named before
    split = {name: [case for case in cases if case.split == name] for name in ("train", "test")}
    vae = load_autoencoder(folder).to(on)  # pyright: ignore[reportArgumentType]
    train = VolumeDataset(split["train"], lenient)
    with tqdm(total=len(train), unit="volume", disable=None, desc="encoding training volumes") as progress:
        summary = latent_summary(vae, train, lambda name: progress.update())
    findings, measured = check_latents(summary), {"latents": summary}
    if not (folder / "model_index.json").is_file():
        return findings, measured
    if not split["test"]:
        remedy = "hold some out (data.test_fraction)"
        return [*findings, warn("quality", "no test volume to compare generated ones with", remedy)], measured
    pipe: Any = MedVolumePipeline.from_pretrained(folder)
    pipe.to(on)
    pipe.set_progress_bar_config(disable=True)
    judged, floor = (VolumeDataset(_spread(split[name], volumes), lenient) for name in ("test", "train"))
    with tqdm(total=len(judged), unit="volume", disable=None, desc="reconstructing and generating") as progress:
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


if __name__ == "__main__":
    sys.exit(main())
