"""Quality against steps and guidance, scheduler by scheduler:

python -m evaluation.studies.samplers --pipeline weights/hippocampus --config configs/hippocampus/ldm.yaml --masks 24 \
    --schedulers euler heun dpmsolver++ unipc --steps 5 10 20 40 --output out/samplers.json

Every combination makes a volume from each of the same test masks and seeds, and so does the pipeline as it comes ("own").
They are compared with real volumes of those masks' split, beside what real training volumes are to these; a segmenter that learned
from other real volumes says whether they obey their masks. `--split validation` is for choosing settings without a look at the test
split. The report, and a table beside it (.md), are written anew after every combination; the same command again goes on with those
that are missing. Guidance takes a model that was trained for it (condition_dropout).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from cli.command import run_command
from cli.settings import (
    NonNegativeFloat,
    Number,
    PositiveInt,
    Seed,
)
from evaluation.networks.defaults import SCHEDULERS, SEGMENTER_STEPS, SHAPE
from evaluation.report import add_overlap_argument, add_wait_argument, config_parser


def parse(args: Sequence[str] | None) -> Namespace:
    """The command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.studies.samplers", __doc__, args)
    parser.add_argument("--pipeline", type=str, required=True, help="pipeline folder or Hub repository")
    parser.add_argument("--output", type=str, required=True, help="report to write, a JSON file")
    add_overlap_argument(parser)
    add_wait_argument(parser)
    parser.add_argument(
        "--masks", type=Number(PositiveInt), default=24, help="masks, spread evenly over all of the split (24)"
    )
    parser.add_argument(
        "--split",
        choices=["test", "validation"],
        default="test",
        help="whose masks; validation is for choosing settings",
    )
    parser.add_argument(
        "--schedulers",
        nargs="*",
        choices=SCHEDULERS,
        default=["euler", "heun", "dpmsolver++", "unipc"],
        help="beside its own",
    )
    parser.add_argument(
        "--steps", type=Number(PositiveInt), nargs="+", default=[5, 10, 20, 40], help="of each scheduler"
    )
    parser.add_argument(
        "--guidance", type=Number(NonNegativeFloat), nargs="+", default=[1.0], help="scales; 0 to 1 is none (1)"
    )
    parser.add_argument("--seed", type=Number(Seed), default=0, help="of the first volume (0)")
    parser.add_argument("--batch_size", type=Number(PositiveInt), default=8, help="volumes denoised together (8)")
    parser.add_argument(
        "--segmenter", type=str, help="file of the segmenter, trained if it is not there; default: beside the report"
    )
    parser.add_argument(
        "--segmenter_steps", type=Number(PositiveInt), default=SEGMENTER_STEPS, help="its training steps"
    )
    parser.add_argument(
        "--shape", type=Number(PositiveInt), nargs=3, default=list(SHAPE), help="voxels it takes; multiples of 8"
    )
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: the accelerator if there is one")
    parsed = parser.instantiate(parser.parse_args(None if args is None else list(args)))
    assert isinstance(parsed, Namespace)
    parsed.shape = tuple(parsed.shape)
    return parsed


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
from diffusion.guidance import check_guidance, guidance_in_effect
from evaluation.data.pairs import (
    Pair,
    label_values,
    learning_cases,
    load_pairs,
    test_cases,
)
from evaluation.data.seen import check_pipeline
from evaluation.metrics.features import EncoderStatistics, RandomStatistics
from evaluation.networks.segmenter import make_segmenter, train_segmenter
from evaluation.report import only_writer_of, provenance, write_report
from files.atomic import atomic_file, write_text
from files.documents import read_object
from files.paths import printable
from pipelines import MedVolumePipeline
from volumes import Case, DataConfig, VolumeDataset, load_cases
from volumes.devices import find_device

from .limits import check_command
from .sampler_figures import (
    DEFAULT_STEPS,
    OF_DIFFUSION,
    OF_FLOWS,
    OWN,
    Combination,
    Judge,
    inputs_from_dataset,
    make_named,
    sample,
)
from .utility import protocol

assert {*SCHEDULERS} == {*OF_FLOWS, *OF_DIFFUSION}  # of which --help tells
COLUMNS = (
    "sampler", "steps", "guidance", "evaluations", "s a volume", "kernel, random", "kernel, encoder", "spectrum, dB",
    "Dice less real", "intensity bias",
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Judge what is missing from the report, and write it."""
    options = parse(args)
    again = "run the same command again: it goes on with the combinations that are missing"
    with stoppable(again), only_writer_of(options.output, options.wait_minutes):
        return judge_missing(options)


def judge_missing(options: Namespace) -> dict[str, Any]:
    """`main`, of these options."""
    device = find_device(options.device)
    cases, config = load_cases(options.data), options.data
    check_command("samplers", cases, config, {"unseen": [options.split], "shape": options.shape})
    pipe: Any = MedVolumePipeline.from_pretrained(options.pipeline)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    wanted = combinations(pipe, options)
    judging, learning = splits(cases, options.split)
    check_pipeline(pipe, config, judging, options.pipeline, accepted=options.accept_overlap)
    test = VolumeDataset(judging, config)
    chosen = [test.cases[i] for i in spread(len(test), options.masks)]
    settings = {
        "model": pipe.model_hash,
        "masks": [case.name for case in chosen],
        "seed": options.seed,
        "batch_size": options.batch_size,
        "segmenter": segmenter_settings(options),
        "data": described(config),
        **({} if options.split == "test" else {"split": options.split}),
    }
    report = earlier(Path(options.output), settings)
    done = [Combination(*(one[key] for key in ("scheduler", "steps", "guidance"))) for one in report["combinations"]]
    missing = [one for one in wanted if one not in done]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} combinations are in {options.output}; {len(missing)} to go")
    if missing:
        judge = prepare(pipe, cases, learning, test, chosen, options)
        for one in LiveBar(missing, desc="samplers", unit="combination"):
            with finishing(f"{one.scheduler} of {one.steps} steps, guidance {one.guidance:g}"):
                made, cost = sample(pipe, judge.asked, one, seed=options.seed, batch_size=options.batch_size)
                figures = {**asdict(one), "volumes": len(made), **cost, **judge(made), "measured": provenance()}
                report["combinations"].append(figures)
                write_report(options.output, report)
                write_text(Path(options.output).with_suffix(".md"), markdown(report))
    print(markdown(report))
    return report


def prepare(
    pipe: MedVolumePipeline,
    cases: Sequence[Case],
    learning: Sequence[Case],
    test: VolumeDataset,
    chosen: Sequence[Case],
    options: Namespace,
) -> Judge:
    """The judge of volumes made from the masks of the `chosen` cases, of those in `test`; its segmenter learns from `learning`."""
    config, device = options.data, pipe.device
    training, of_masks = (
        VolumeDataset(part, config) for part in ([case for case in cases if case.split == "train"], chosen)
    )
    first, second = ((_unit(one), [case.subject for case in one.cases]) for one in (training, test))
    segmenter = real_segmenter(learning, options, device)
    judged = load_pairs([Pair(case) for case in of_masks.cases], config, options.shape)
    extractors = {"random": RandomStatistics().to(device), "encoder": EncoderStatistics(pipe.vae)}
    count = len(extractors) * (len(training) + len(test))
    with LiveBar(total=count, unit="volume", disable=None, desc="features of real volumes") as progress:

        def on_volume() -> None:
            progress.update()

        return Judge(
            inputs_from_dataset(of_masks, pipe.unet),
            first,
            second,
            _unit(of_masks),
            extractors,
            segmenter,
            judged,
            len(label_values(config)),
            device,
            on_volume,
        )


def combinations(pipe: MedVolumePipeline, options: Namespace) -> list[Combination]:
    """The pipeline's own sampler with its own default of steps, and all that is asked for.

    Raises: ValueError for schedulers, steps and guidance that the model cannot take, before any work.
    """
    if min([*options.steps, options.masks, options.batch_size]) < 1:
        raise ValueError("--steps, --masks and --batch_size must be 1 or more")
    for scale in options.guidance:
        schema = pipe.unet.condition_schema
        check_guidance(scale, schema.dropout, {"mask", *schema.classes, *schema.numbers})
    scales: Any = [guidance_in_effect(scale) for scale in options.guidance]
    for name in options.schedulers:
        for steps in options.steps:
            set_timesteps(make_named(name, pipe), steps, None, torch.device("cpu"))
    every = [Combination(n, s, g) for n in options.schedulers for s in options.steps for g in scales]
    return list(dict.fromkeys([Combination(OWN, DEFAULT_STEPS, 1.0), *every]))


def earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report to go on with. Raises: ValueError for one that was measured otherwise."""
    if not path.exists():
        return {"evaluation": "samplers", "settings": settings, "combinations": []}
    report = read_object(path)
    if report.get("evaluation") != "samplers":
        raise ValueError(f"{path}: is no report of evaluation.studies.samplers; choose another --output")
    _check_combinations(path, report)
    if different := sorted(key for key, value in settings.items() if report["settings"].get(key) != value):
        raise ValueError(f"{path}: was measured with another {', another '.join(different)}; choose another --output")
    return report


def _check_combinations(path: Path, report: Mapping[str, Any]) -> None:
    """Raises: ValueError for a report that was damaged."""
    try:
        for one in report["combinations"]:
            Combination(*(one[key] for key in ("scheduler", "steps", "guidance")))
        markdown(dict(report))
        report["settings"].get("model")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: is damaged ({type(error).__name__}: {error}); delete it, or choose another --output"
        ) from error


def described(config: DataConfig) -> dict[str, Any]:
    """The section `data` as a report holds it."""
    return json.loads(json.dumps(asdict(config)))


def segmenter_settings(options: Namespace) -> dict[str, Any]:
    """What a segmenter depends on, beside the section `data`."""
    return {**protocol(options.shape, options.segmenter_steps, None), "seed": 0, "labels": label_values(options.data)}


def splits(cases: Sequence[Case], judging: str) -> tuple[list[Case], list[Case]]:
    """Cases that judge, and those that a segmenter may learn from: neither test nor judging. With "validation" settings can be
    chosen without a look at the test split."""
    if judging == "test":
        return test_cases(cases), learning_cases(cases)
    return (
        learning_cases([case for case in cases if case.split == judging]),
        learning_cases([case for case in cases if case.split not in ("test", judging)]),
    )


def real_segmenter(learning: Sequence[Case], options: Namespace, device: torch.device) -> nn.Module:
    """The segmenter of `--segmenter`, or one that learns now from the real volumes of `learning`, and is kept there.

    Raises: ValueError for a file of another segmenter.
    """
    output = Path(options.output)
    judging = {} if options.split == "test" else {"judges": options.split}
    settings = json.dumps({**segmenter_settings(options), "data": described(options.data), **judging})
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
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last of them of other tensors
            raise ValueError(f"{path}: is no segmenter, or damaged ({error}); choose another --segmenter") from error
        if stored != settings:
            found = printable(str(stored))[:2000]
            raise ValueError(f"{path}: holds a segmenter of {found}, not of {settings}; choose another --segmenter")
        return segmenter.to(device).eval()
    learned = load_pairs([Pair(case) for case in learning], config, options.shape)
    with LiveBar(total=options.segmenter_steps, unit="step", disable=None, desc="training the segmenter") as progress:

        def on_step(step: int, loss: float) -> None:
            progress.update()

        segmenter = train_segmenter(
            learned.images,
            learned.labels,
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


def spread(items: int, count: int) -> list[int]:
    """`count` of the numbers from 0 to items - 1 (all, where there are fewer), evenly spread."""
    return np.unique(np.linspace(0, items - 1, min(count, items)).round().astype(int)).tolist()


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, with the real-against-real floor as its last row and 95 % intervals in brackets."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    found = report["combinations"]
    for one in found:
        name = f"{one['scheduler']} ({one['scheduler_class']})" if one["scheduler"] == OWN else one["scheduler"]
        cells = [name, str(one["steps"]), f"{one['guidance']:g}", f"{one['evaluations_per_volume']:g}"]
        cells.append(f"{one['seconds_per_volume']['median']:.2f}")
        cells += [_cell(one["kernel"][name]["generated_to_test"]) for name in ("random", "encoder")]
        cells.append(_cell(one["spectrum"]["difference_db"]["generated_to_test"], "{:.2f}"))
        for paired in (one["dice"]["difference"], one["intensity_bias"]):
            cells.append(_cell({"mean": paired["of_means"], "interval": paired["interval_subjects"]}, "{:+.4f}"))
        lines.append(f"| {' | '.join(cells)} |")
    if found:
        floor = found[0]
        cells = ["real training volumes", "", "", "", ""]
        cells += [_cell(floor["kernel"][name]["training_to_test"]) for name in ("random", "encoder")]
        cells += [_cell(floor["spectrum"]["difference_db"]["training_to_test"], "{:.2f}")]
        cells += [f"Dice of real {floor['dice']['real']:.4f}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, Any], form: str = "{:.4f}") -> str:
    low, high = value["interval"]
    return f"{form.format(value['mean'])} ({form.format(low)} to {form.format(high)})"


def _unit(dataset: VolumeDataset) -> list[np.ndarray]:
    """(C, X, Y, Z) each, in [0, 1] as for the model."""
    return [(prepared.image.array + 1) / 2 for prepared in dataset.prepared]
