"""Judge a model:

python evaluate.py reconstruction --config configs/hippocampus/vae.yaml --vae weights/hippocampus --output out/reconstruction.json
python evaluate.py dice --config configs/hippocampus/ldm.yaml --synthetic out/generated --output out/dice.json

`--config` names a training config, of which only the section `data` is read; `--data.root DIR` and the like override it.
Reports are JSON and say what they were measured on.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from evaluation import (
    CROP,
    ITERATIONS,
    SHAPE,
    SOURCES,
    Pair,
    evaluate_reconstruction,
    generated_pairs,
    iterations_of,
    label_values,
    learning_cases,
    load_pairs,
    protocol,
    provenance,
    ratios,
    score_training,
    test_cases,
    write_report,
)
from pipelines.loading import load_autoencoder
from training import resolve_precision
from volumes import DataConfig, VolumeDataset, load_cases


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run one evaluation (default: as the command line says), write its report and return it."""
    values = parse(args)
    command = values.pop("subcommand")
    options = values[command]
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if resolve_precision(options.precision) == "bf16" else None
    evaluate = {"reconstruction": judge_reconstruction, "dice": judge_dice}[command]
    return evaluate(options, device, dtype)


def parse(args: list[str] | None) -> Namespace:
    """The command line, with the data section of `--config` as the defaults of `--data.*`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(args)[0].config
    data = read_data_section(config) if config else None

    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subcommands()

    fidelity = ArgumentParser(
        description="PSNR inside the field of view and power spectrum of reconstructions, on one split."
    )
    add_common_arguments(fidelity, data)
    fidelity.add_argument(
        "--vae",
        type=str,
        required=True,
        help="folder of an autoencoder, or of a pipeline or a run that has one in vae/",
    )
    fidelity.add_argument("--split", choices=["train", "validation", "test"], default="test", help="which volumes")
    fidelity.add_argument(
        "--crop", type=int, nargs=3, default=list(CROP), help="voxels of the centre crops whose spectra are compared"
    )
    commands.add_subcommand("reconstruction", fidelity)

    usefulness = ArgumentParser(
        description="Dice on the test split of a small segmenter trained on real, generated, or both volumes."
    )
    add_common_arguments(usefulness, data)
    usefulness.add_argument(
        "--synthetic", type=str, help="folder of volumes generated from the training split's masks by generate.py"
    )
    usefulness.add_argument("--train_on", nargs="+", choices=SOURCES, default=list(SOURCES), help="what to learn from")
    usefulness.add_argument("--seeds", type=int, default=3, help="trainings per source, with seeds 0, 1, ...")
    usefulness.add_argument(
        "--iterations", type=int, default=ITERATIONS, help="training steps; both sources together get twice as many"
    )
    usefulness.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=list(SHAPE),
        help="voxels that volumes are cropped or padded to; multiples of 8",
    )
    usefulness.add_argument(
        "--earlier", nargs="+", default=[], help="earlier reports whose scores are taken instead of training again"
    )
    commands.add_subcommand("dice", usefulness)
    parsed = parser.instantiate(parser.parse_args(args))
    assert isinstance(parsed, Namespace)
    return parsed


def add_common_arguments(parser: ArgumentParser, data: dict[str, Any] | None) -> None:
    parser.add_argument(
        "--config", type=str, required=True, help="training config whose section `data` says which volumes"
    )
    parser.add_class_arguments(DataConfig, "data", help="overrides of the config's section `data`")
    if data is not None:
        parser.set_defaults({f"data.{key}": value for key, value in data.items()})
    parser.add_argument("--output", type=str, required=True, help="report to write, a JSON file")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "no"],
        default="auto",
        help="auto is bf16 where the hardware has it, else float32",
    )
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: the accelerator if there is one")


def read_data_section(path: Path) -> dict[str, Any]:
    """The section `data` of a YAML config. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise ValueError(f"{path}: has no section `data`; give a training config")
    return content["data"]


def judge_reconstruction(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """`evaluate.py reconstruction`."""
    vae = load_autoencoder(options.vae).to(device)  # pyright: ignore[reportArgumentType]
    cases = [case for case in load_cases(options.data) if case.split == options.split]
    if not cases:
        raise ValueError(
            f"no case is in split {options.split!r}; choose another --split, or see `data` in {options.config}"
        )
    dataset = VolumeDataset(cases, options.data)
    start = time.perf_counter()
    with tqdm(
        total=len(dataset), unit="volume", disable=None, desc=f"reconstructing split {options.split}"
    ) as progress:

        def on_volume(name: str, decibels: float) -> None:
            progress.set_postfix_str(f"{name} {decibels:.1f} dB")
            progress.update()

        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            result = evaluate_reconstruction(vae, dataset, crop=tuple(options.crop), on_volume=on_volume)
    report = {
        "evaluation": "reconstruction",
        **result,
        "split": options.split,
        "vae": options.vae,
        "precision": "float32" if dtype is None else "bfloat16",
        "skipped": dict(dataset.skipped),
        "seconds": round(time.perf_counter() - start, 2),
        "data": dataclasses.asdict(options.data),
        **provenance(),
    }
    write_report(options.output, report)
    print(
        f"PSNR inside the field of view: {result['psnr_db']['mean']:.2f} dB, mean of {result['volumes']} volumes ({options.split})"
    )
    print("power of reconstructions over real, dB by cycles/voxel:")
    print("  ".join(f"{band}: {value:+.1f}" for band, value in result["spectrum"]["ratio_db"].items()))
    print(f"report: {options.output}")
    return report


def judge_dice(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """`evaluate.py dice`. The report is written anew after every training, so a run that is stopped leaves what it has."""
    config, shape = options.data, tuple(options.shape)
    cases = load_cases(config)
    learn, judge = learning_cases(cases), test_cases(cases)
    pairs = {"real": [Pair(case) for case in learn]}
    if options.synthetic:
        pairs["synthetic"] = generated_pairs(cases, Path(options.synthetic))
        pairs["both"] = pairs["real"] + pairs["synthetic"]
    elif set(options.train_on) != {"real"}:
        raise ValueError("--synthetic is missing: give a folder of generated volumes, or --train_on real")
    report: dict[str, Any] = {
        "evaluation": "dice",
        "protocol": protocol(shape, options.iterations, dtype),
        "volumes": {"judge": len(judge), **{source: len(listed) for source, listed in pairs.items()}},
        "scores": {},
        "synthetic": options.synthetic,
        "data": dataclasses.asdict(config),
        **provenance(),
    }
    for path in options.earlier:
        report["scores"].update(earlier_scores(Path(path), report))
    num_labels = len(label_values(config))
    judged = load_pairs([Pair(case) for case in judge], config, shape)
    report["skipped"] = dict(judged.skipped)
    sources = [source for source in options.train_on if source not in report["scores"]]
    clock = StepClock(sum(options.seeds * iterations_of(source, options.iterations) for source in sources))
    for source in sources:
        learned = load_pairs(pairs[source], config, shape)
        report["skipped"].update(learned.skipped)
        report["scores"][source] = []
        for seed in range(options.seeds):
            steps = iterations_of(source, options.iterations)
            with tqdm(total=steps, unit="step", disable=None, desc=f"learning from {source}, seed {seed}") as progress:
                result = score_training(
                    learned,
                    judged,
                    num_labels,
                    seed=seed,
                    iterations=steps,
                    device=device,
                    dtype=dtype,
                    on_step=clock.watch(progress),
                )
            report["scores"][source].append(result)
            report["ratios"] = ratios(report["scores"])
            write_report(options.output, report)
            print(f"{source}, seed {seed}: Dice {result['dice']:.4f}, {result['seconds']:.0f} s", flush=True)
    report["ratios"] = ratios(report["scores"])
    write_report(options.output, report)
    for source, results in report["scores"].items():
        print(
            f"{source}: {sum(r['dice'] for r in results) / len(results):.4f}  {[round(r['dice'], 4) for r in results]}"
        )
    for name, ratio in report["ratios"].items():
        print(f"{name}: {ratio['of_means']:.4f}  {[round(r, 4) for r in ratio['per_seed'].values()]}")
    print(f"report: {options.output}")
    return report


def earlier_scores(path: Path, report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Scores by source of an earlier report. Raises ValueError unless it was measured on the same data by the same protocol."""
    earlier = json.loads(path.read_text())
    for key in ("protocol", "data"):
        if json.loads(json.dumps(report[key])) != earlier.get(key):
            raise ValueError(f"{path}: was measured with another {key} ({earlier.get(key)}); train again")
    if set(earlier["scores"]) != {"real"} and earlier["synthetic"] != report["synthetic"]:
        raise ValueError(f"{path}: learned from the volumes in {earlier['synthetic']}, not in {report['synthetic']}")
    for source in ("judge", *earlier["scores"]):
        if earlier["volumes"][source] != report["volumes"].get(source):
            raise ValueError(
                f"{path}: has {earlier['volumes'][source]} volumes ({source}), not {report['volumes'].get(source)}"
            )
    return earlier["scores"]


class StepClock:
    """Says after the first steps how long all of them will take."""

    def __init__(self, steps: int):
        self.steps, self.start, self.told = steps, 0.0, False

    def watch(self, progress: tqdm) -> Callable[[int, float], None]:
        """A callback for each training step: (step counted from 1, loss)."""

        def on_step(step: int, loss: float) -> None:
            progress.update()
            progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if step == 1:  # the first step prepares kernels, so the clock starts after it
                self.start = time.perf_counter()
            elif step == 4 and not self.told:
                seconds = (time.perf_counter() - self.start) / 3
                progress.write(
                    f"a training step takes {seconds:.2f} s: about {seconds * self.steps / 60:.0f} minutes for {self.steps} steps"
                )
                self.told = True

        return on_step


if __name__ == "__main__":
    main()
