"""Compare the quality of schedulers at several steps and guidance scales, guidance intervals and scales of
autoguidance:

    python -m evaluation.studies.samplers --pipeline weights/hippocampus --config configs/hippocampus/ldm.yaml \
        --masks 24 --schedulers euler heun dpmsolver++ unipc --steps 5 10 20 40 --output out/samplers.json

Every combination generates a volume from each of the same test masks and seeds, and so does the pipeline's own
scheduler, with the steps and guidance of its sampling.json ("own"). The volumes are compared with real volumes of the
masks' split, beside the distance of real training volumes from these. A segmenter trained on other real volumes
measures mask adherence.

`--split validation` chooses settings without using the test split: the report then names the cheapest combination that
is as good as the best in the kernel distance of the encoder's features, the spectrum and Dice (the rule is in
evaluation/studies/sampler_report.py). `python -m tools.ship --samplers REPORT` writes it into a pipeline.

The report, and a table beside it (.md), are written after every combination; run the same command again to resume with
the missing ones. Guidance needs a model that was trained for it (condition_dropout).
"""

import json
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from cli.command import run_command
from cli.settings import (
    NonNegativeFloat,
    Number,
    PositiveInt,
    Seed,
    Share,
)
from evaluation.networks.defaults import SCHEDULERS, SEGMENTER_STEPS, SHAPE
from evaluation.report import add_overlap_argument, add_wait_argument, config_parser
from volumes.data.config_parser import ConfigParser


def parse(args: Sequence[str] | None) -> Namespace:
    """Parse the command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.studies.samplers", __doc__, args)
    parser.add_argument("--pipeline", type=str, required=True, help="pipeline folder or Hub repository")
    parser.add_argument("--output", type=str, required=True, help="report to write, a JSON file")
    add_overlap_argument(parser)
    add_wait_argument(parser)
    parser.add_argument(
        "--masks", type=Number(PositiveInt), default=24, help="number of masks, spread evenly over the split (24)"
    )
    parser.add_argument(
        "--split",
        choices=["test", "validation"],
        default="test",
        help="split of the masks; use validation to choose settings",
    )
    add_combinations(parser)
    parser.add_argument("--seed", type=Number(Seed), default=0, help="seed of the first volume (0)")
    parser.add_argument("--batch_size", type=Number(PositiveInt), default=8, help="volumes denoised together (8)")
    parser.add_argument(
        "--segmenter", type=str, help="file of the segmenter, trained if it does not exist; default: beside the report"
    )
    parser.add_argument(
        "--segmenter_steps", type=Number(PositiveInt), default=SEGMENTER_STEPS, help="training steps of the segmenter"
    )
    parser.add_argument(
        "--shape",
        type=Number(PositiveInt),
        nargs=3,
        default=list(SHAPE),
        help="input size of the segmenter in voxels; multiples of 8",
    )
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: the accelerator, if any")
    parsed = parser.instantiate(parser.parse_args(None if args is None else list(args)))
    assert isinstance(parsed, Namespace)
    parsed.shape = tuple(parsed.shape)
    return parsed


def add_combinations(parser: ConfigParser) -> None:
    """Add the options that name what is compared: schedulers, steps and guidance."""
    parser.add_argument(
        "--schedulers",
        nargs="*",
        choices=SCHEDULERS,
        default=["euler", "heun", "dpmsolver++", "unipc"],
        help="schedulers, besides the pipeline's own",
    )
    parser.add_argument(
        "--steps",
        type=Number(PositiveInt),
        nargs="+",
        default=[5, 10, 20, 40],
        help="denoising steps of each scheduler",
    )
    parser.add_argument(
        "--guidance",
        type=Number(NonNegativeFloat),
        nargs="+",
        default=[1.0],
        help="guidance scales; 0 to 1 means no guidance (1)",
    )
    parser.add_argument(
        "--guidance_intervals",
        type=interval,
        nargs="+",
        default=[(0.0, 1.0)],
        metavar="LO,HI",
        help="noise levels between which guidance acts, such as 0,1 0.2,0.8 (0,1, which is all)",
    )
    parser.add_argument(
        "--autoguidance",
        type=Number(NonNegativeFloat),
        nargs="+",
        default=[1.0],
        help="scales of the guidance by the pipeline's weaker U-Net; 0 to 1 means none (1)",
    )
    parser.add_argument("--unet_weak", type=str, help="folder of the weaker U-Net; default: the pipeline's own")


def interval(text: Any) -> tuple[float, float]:
    """Parse LO,HI. Raises: ArgumentTypeError for anything else."""
    ends = text.split(",") if isinstance(text, str) else text
    try:
        low, high = (Number(Share)(end) for end in ends)
        if not low < high:
            raise ValueError
    except (TypeError, ValueError, ArgumentTypeError) as error:
        raise ArgumentTypeError(f"got {text!r}, expected LO,HI with 0 <= LO < HI <= 1, such as 0.2,0.8") from error
    return low, high


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from autoencoder.weights import open_safetensors
from cli.live_bar import LiveBar
from cli.stopping import finishing, stoppable
from diffusion.denoise import set_timesteps
from diffusion.guidance import autoguidance_in_effect, check_guidance, guidance_in_effect
from evaluation.data.pairs import (
    Pair,
    label_values,
    learning_cases,
    load_pairs,
    test_cases,
)
from evaluation.data.seen import check_pipeline
from evaluation.data.volume_sets import UnitVolumes
from evaluation.metrics.features import EncoderStatistics, RandomStatistics
from evaluation.networks.segmenter import make_segmenter, train_segmenter
from evaluation.report import only_writer_of, provenance, write_report
from files.atomic import atomic_file, write_text
from files.paths import printable
from pipelines import MedVolumePipeline, SamplingConfig
from pipelines.storage.loading import check_autoguidance
from volumes import Case, DataConfig, VolumeDataset, load_cases
from volumes.devices import find_device

from .limits import check_command
from .sampler_figures import (
    OF_DIFFUSION,
    OF_FLOWS,
    OWN,
    Combination,
    SamplerScorer,
    inputs_from_dataset,
    make_named,
    sample,
)
from .sampler_report import Entry, SamplerReport, Settings, choose, combination_of, markdown, named, read_report
from .utility import protocol

assert {*SCHEDULERS} == {*OF_FLOWS, *OF_DIFFUSION}  # `--help` lists them


def main(args: Sequence[str] | None = None) -> SamplerReport:
    """Score the combinations that are missing from the report, and write it."""
    options = parse(args)
    again = "run the same command again to resume with the missing combinations"
    with stoppable(again), only_writer_of(options.output, options.wait_minutes):
        return score_missing(options)


def score_missing(options: Namespace) -> SamplerReport:
    """Run `main` with these options."""
    device = find_device(options.device)
    cases, config = load_cases(options.data), options.data
    check_command("samplers", cases, config, {"unseen": [options.split], "shape": options.shape})
    pipe: Any = MedVolumePipeline.from_pretrained(options.pipeline)
    pipe.to(device)
    if options.unet_weak:
        pipe.load_unet_weak(options.unet_weak)
    pipe.set_progress_bar_config(disable=True)
    requested = combinations(pipe, options)
    test_set, train_set = splits(cases, options.split)
    check_pipeline(pipe, config, test_set, options.pipeline, accepted=options.accept_overlap)
    test = VolumeDataset(test_set, config)
    chosen = [test.cases[i] for i in evenly_spread(len(test), options.masks)]
    settings: Settings = {
        "model": pipe.model_hash,
        "masks": [case.name for case in chosen],
        "seed": options.seed,
        "batch_size": options.batch_size,
        "segmenter": segmenter_settings(options),
        "data": data_as_json(config),
    }
    if pipe.unet_weak is not None:
        settings["unet_weak"] = pipe.unet_weak_hash
    without = SamplingConfig().filled(pipe.sampling_settings).without
    if without is not None:
        settings["guidance_without"] = without
    if options.split != "test":
        settings["split"] = options.split
    report = earlier_report(Path(options.output), settings)
    done = [combination_of(entry) for entry in report["combinations"]]
    missing = [combination for combination in requested if combination not in done]
    print(
        f"{len(requested) - len(missing)} of {len(requested)} combinations are in {options.output}; {len(missing)} to "
        "go"
    )
    if missing:
        scorer = prepare(pipe, cases, train_set, test, chosen, options)
        for combination in LiveBar(missing, desc="samplers", unit="combination"):
            words = f"{combination.scheduler} of {combination.steps} steps, guidance {combination.guidance_in_words}"
            with finishing(words):
                volumes, cost = sample(
                    pipe, scorer.inputs, combination, seed=options.seed, batch_size=options.batch_size
                )
                entry: Entry = {
                    **named(combination),
                    "volumes": len(volumes),
                    **cost,
                    **scorer(volumes),
                    "measured": provenance(),
                }
                report["combinations"].append(entry)
                if options.split == "validation":
                    report["chosen"] = choose(report["combinations"])
                write_report(options.output, report)
                write_text(Path(options.output).with_suffix(".md"), markdown(report))
    print(markdown(report))
    return report


def prepare(
    pipe: MedVolumePipeline,
    cases: Sequence[Case],
    train_set: Sequence[Case],
    test: VolumeDataset,
    chosen: Sequence[Case],
    options: Namespace,
) -> SamplerScorer:
    """Make the scorer of volumes generated from the masks of the `chosen` cases of `test`; `train_set` is its
    segmenter's."""
    config, device = options.data, pipe.device
    training = VolumeDataset([case for case in cases if case.split == "train"], config)
    of_masks = VolumeDataset(chosen, config)
    segmenter = real_segmenter(train_set, options, device)
    pairs = load_pairs([Pair(case) for case in of_masks.cases], config, options.shape)
    extractors = {"random": RandomStatistics().to(device), "encoder": EncoderStatistics(pipe.vae)}
    count = len(extractors) * (len(training) + len(test))
    with LiveBar(total=count, unit="volume", disable=None, desc="features of real volumes") as progress:

        def on_volume() -> None:
            progress.update()

        return SamplerScorer(
            inputs_from_dataset(of_masks, pipe.unet),
            (UnitVolumes(training), [case.subject for case in training.cases]),
            (UnitVolumes(test), [case.subject for case in test.cases]),
            UnitVolumes(of_masks),
            extractors,
            segmenter,
            pairs,
            len(label_values(config)),
            device,
            on_volume,
        )


def combinations(pipe: MedVolumePipeline, options: Namespace) -> list[Combination]:
    """List the pipeline's own sampler with its own steps and guidance, and all requested combinations.

    Raises: ValueError for schedulers, steps and guidance that the model does not support, before any work.
    """
    if min([*options.steps, options.masks, options.batch_size]) < 1:
        raise ValueError("--steps, --masks and --batch_size must be 1 or more")
    for scale in options.guidance:
        schema = pipe.denoiser.condition_schema
        check_guidance(scale, schema.dropout, {"mask", *schema.classes, *schema.numbers})
    scales: Any = [guidance_in_effect(scale) for scale in options.guidance]
    weak = [autoguidance_in_effect(scale) for scale in options.autoguidance]
    check_autoguidance(max(weak), pipe.unet_weak)
    for name in options.schedulers:
        for steps in options.steps:
            set_timesteps(make_named(name, pipe), steps, None, torch.device("cpu"))
    own = SamplingConfig().filled(pipe.sampling_settings)
    without = own.without is not None  # the same in all combinations
    every = [
        Combination(*one, without)
        for one in product(options.schedulers, options.steps, scales, options.guidance_intervals, weak)
    ]
    scale: Any = guidance_in_effect(own.guidance_scale)
    weaker = autoguidance_in_effect(own.autoguidance_scale)
    of_pipeline = Combination(OWN, own.steps, scale, own.interval, weaker, without)
    return list(dict.fromkeys([of_pipeline, *every]))


def earlier_report(path: Path, settings: Settings) -> SamplerReport:
    """Read the report to resume. Raises: ValueError for one with other settings."""
    if not path.exists():
        return {"evaluation": "samplers", "settings": settings, "combinations": []}
    report = read_report(path)
    known: Any = settings
    keys = {*settings, "guidance_without"}  # which a pipeline may have had, and not now
    if different := sorted(key for key in keys if report["settings"].get(key) != known.get(key)):
        raise ValueError(f"{path}: was measured with another {', another '.join(different)}; choose another --output")
    return report


def data_as_json(config: DataConfig) -> dict[str, object]:
    """Return the section `data` as a report stores it."""
    return json.loads(json.dumps(asdict(config)))


def segmenter_settings(options: Namespace) -> dict[str, object]:
    """Return all settings that a segmenter depends on, except the section `data`."""
    return {**protocol(options.shape, options.segmenter_steps, None), "seed": 0, "labels": label_values(options.data)}


def splits(cases: Sequence[Case], split: str) -> tuple[list[Case], list[Case]]:
    """Return the cases of the tested split, and the segmenter's training set: all cases neither of it nor of the test
    split."""
    if split == "test":
        return test_cases(cases), learning_cases(cases)
    return (
        learning_cases([case for case in cases if case.split == split]),
        learning_cases([case for case in cases if case.split not in ("test", split)]),
    )


def real_segmenter(train_set: Sequence[Case], options: Namespace, device: torch.device) -> nn.Module:
    """Load the segmenter of `--segmenter`, or train one on the real volumes of `train_set` and write it there.

    Raises: ValueError for the file of another segmenter.
    """
    output = Path(options.output)
    split = {} if options.split == "test" else {"judges": options.split}
    settings = json.dumps({**segmenter_settings(options), "data": data_as_json(options.data), **split})
    path = Path(options.segmenter or output.with_name(f"{output.stem}_segmenter.safetensors"))
    config, num_labels = options.data, len(label_values(options.data))
    if path.exists():
        segmenter = make_segmenter(len(config.channels), num_labels)
        try:
            with open_safetensors(path) as file:
                stored = (file.metadata() or {}).get("segmenter")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if stored == settings:
                segmenter.load_state_dict(tensors)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: other tensors
            raise ValueError(f"{path}: is not a segmenter, or damaged ({error}); choose another --segmenter") from error
        if stored != settings:
            other = printable(str(stored))[:2000]
            raise ValueError(f"{path}: is a segmenter of {other}, not of {settings}; choose another --segmenter")
        return segmenter.to(device).eval()
    pairs = load_pairs([Pair(case) for case in train_set], config, options.shape)
    with LiveBar(total=options.segmenter_steps, unit="step", disable=None, desc="training the segmenter") as progress:

        def on_step(step: int, loss: float) -> None:
            progress.update()

        segmenter = train_segmenter(
            pairs.images,
            pairs.labels,
            num_labels,
            seed=0,
            iterations=options.segmenter_steps,
            device=device,
            on_step=on_step,
        )
    with atomic_file(path) as unfinished:
        save_file(
            {k: v.cpu().contiguous() for k, v in segmenter.state_dict().items()}, unfinished, {"segmenter": settings}
        )
    return segmenter


def evenly_spread(items: int, count: int) -> list[int]:
    """Choose `count` of the numbers from 0 to items - 1 (all, if there are fewer), evenly spread."""
    return np.unique(np.linspace(0, items - 1, min(count, items)).round().astype(int)).tolist()
