"""Draw the pictures of docs/conditions, and of README, with trained pipelines.

    python -m tools.pictures mask|classes|numbers|images|edits|calls|demo [--pipeline DIR]

Each command prints its measurements on the generated volumes, and writes them beside the picture as JSON.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "conditions"
NAMES = ("mask", "edits", "classes", "images", "numbers", "calls", "demo")
OF_VOLUMES = ("edits", "images")  # pictures that need real volumes


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("picture", choices=NAMES, help="picture to draw")
    parser.add_argument("--pipeline", type=Path, help="pipeline to use instead of the default one")
    parser.add_argument("--data.root", dest="root", help="folder of the volumes; default: that of the config")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write to (docs/conditions)")
    options = parser.parse_args(args)
    if options.root and options.picture not in OF_VOLUMES:
        parser.error(f"--data.root: the picture {options.picture} needs no volumes; remove it")
    return options


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
from matplotlib.figure import Figure

from evaluation.report import provenance, write_report
from evaluation.studies.edit_borders import border_jump, labeled_region
from pipelines import MedVolumeEditPipeline, MedVolumePipeline
from training import TrainLdmConfig, parse_config
from volumes import (
    PHANTOM_CLASSES,
    Case,
    DataConfig,
    FigureCase,
    load_cases,
    make_phantom,
    read_mask,
    read_volume,
    shapes_figure,
    slices_figure,
)
from volumes.lesions import ellipsoid, insert_lesion, remove_lesion
from volumes.phantom import INTENSITY

HIPPOCAMPUS = ROOT / "weights" / "hippocampus"
STUDENT = ROOT / "weights" / "hippocampus-fast"
SEED = 0

Measured = dict[str, dict[str, float]]  # {volume: {quantity: value}}


def seeds(count: int) -> list[torch.Generator]:
    """Return generators with consecutive seeds."""
    return [torch.Generator().manual_seed(SEED + i) for i in range(count)]


def mask(pipe: MedVolumePipeline) -> tuple[Figure, Measured]:
    """Generate from one test mask with three seeds, and from the mask shifted, thickened and shortened."""
    mask_volume = read_mask(HIPPOCAMPUS / "masks" / "hippocampus_015.nii.gz")
    labels = mask_volume.array[0]
    thick = torch.nn.functional.max_pool3d(torch.from_numpy(labels).float()[None], 3, 1, 1)[0].numpy().astype(np.int16)
    edits = {
        "shifted by 6 mm": np.roll(labels, 6, axis=1),
        "thicker by 1 mm": thick,
        "anterior alone": labels * (labels == 1),
    }
    cases = {f"as it is, seed {seed}": labels for seed in range(3)} | edits
    masks = [mask_volume.replace(case[None]) for case in cases.values()]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2, 0, 0, 0)]
    out = pipe(mask=masks, guidance_scale=1.0, generator=generators, output_type="np")
    columns, measured = [], {}
    for title, case, volume in zip(cases, cases.values(), out.volumes, strict=True):
        inside, around = volume[0][case > 0].mean(), volume[0][case == 0].mean()
        measured[title] = {"mean inside the mask": float(inside), "mean outside": float(around)}
        columns.append(
            {"title": title, "images": {"generated": volume[0]}, "mask": case, "spacing": mask_volume.spacing}
        )
    return slices_figure(columns), measured


def classes(pipe: MedVolumePipeline) -> tuple[Figure, Measured]:
    """Generate from the same six seeds for each diagnosis, without a diagnosis, and with guidance."""
    count, rows, measured = 6, {}, {}
    kinds = [(f"{value}", {"diagnosis": value}, 1.0) for value in pipe.data.classes["diagnosis"]]
    kinds += [("none given", {}, 1.0), ("hyperplasia, guided by 3", {"diagnosis": "hyperplasia"}, 3.0)]
    for name, labels, scale in kinds:
        out = pipe(
            shape=(64, 64, 64), classes=[labels] * count, generator=seeds(count), guidance_scale=scale, output_type="np"
        )
        rows[name.replace(", ", ",\n")] = [volume[0] for volume in out.volumes]
        measured[name] = {"mean volume in ml": float(np.mean([(volume > 0).sum() for volume in out.volumes]) / 1000)}
    return shapes_figure(rows), measured


def numbers(pipe: MedVolumePipeline) -> tuple[Figure, Measured]:
    """Generate dark and bright lesions of growing volume from one seed, and measure their volume by a threshold.

    For comparison, the same is measured on the autoencoder's reconstructions of real lesions (a line fitted to 200 new
    phantoms).
    """
    columns, measurements = [], {}
    real = [make_phantom(10_000 + number, (32, 32, 32)) for number in range(200)]
    for index, (kind, threshold) in enumerate(zip(PHANTOM_CLASSES, (300.0, 850.0), strict=True)):
        kept = np.array(
            [
                (float((mask.array == 3).sum()), _beyond(_reconstruction(pipe, image.array), threshold))
                for image, mask, of_class in real
                if of_class == index
            ]
        )
        slope, offset = np.polyfit(kept[:, 0], kept[:, 1], 1)
        for requested in (80, 115, 150):
            measured = []
            for generator in seeds(8):
                volume = pipe(
                    shape=(32, 32, 32),
                    classes={"class": kind},
                    numbers={"lesion_volume": requested},
                    generator=generator,
                    output_type="np",
                ).volumes[0][0]
                measured.append(_beyond(volume, threshold))
                if generator.initial_seed() == SEED:
                    columns.append({"title": f"{kind},\n{requested} voxels", "images": {"generated": volume}})
            measurements[f"{kind}, {requested} voxels asked"] = {
                "mean": float(np.mean(measured)),
                "lowest": float(min(measured)),
                "highest": float(max(measured)),
                "of real ones the autoencoder leaves": float(slope * requested + offset),
            }
    return slices_figure(columns), measurements


def _reconstruction(pipe: MedVolumePipeline, image: np.ndarray) -> np.ndarray:
    """Reconstruct a phantom (1, X, Y, Z); return (X, Y, Z) in its units."""
    low, high = pipe.data.intensity[0].low, pipe.data.intensity[0].high
    scaled = torch.from_numpy(2 * (image - low) / (high - low) - 1).float().clamp(-1, 1)
    with torch.inference_mode():
        mean = pipe.vae.encode(scaled[None], return_dict=False)[0].mean
        return ((pipe.vae.decode(mean, return_dict=False)[0][0, 0] + 1) / 2 * (high - low) + low).numpy()


def _beyond(volume: np.ndarray, threshold: float, organ: float = INTENSITY["organ"]) -> int:
    """Count the voxels in the middle that differ from the organ by more than the threshold does."""
    middle = volume[9:23, 9:23, 9:23]
    return int(((middle - threshold) * (threshold - organ) > 0).sum())


def _data(recipe: str, root: str | None) -> DataConfig:
    """Return the data section of a recipe, with another root if it is given."""
    config = ["--config", str(ROOT / "configs" / recipe / "ldm.yaml")]
    return parse_config(TrainLdmConfig, [*config, *([f"--data.root={root}"] if root else [])]).data


def images(pipe: MedVolumePipeline, root: str | None = None) -> tuple[Figure, Measured]:
    """Compare real CT and PET of test patients with PET from that CT, and with both from tumor mask and sex."""
    config = _data("sarcoma", root)
    cases = [case for case in load_cases(config) if case.split == "test"]
    windows = {
        name: (scale.low, scale.high) for name, scale in zip(pipe.data.channels, pipe.data.intensity, strict=True)
    }
    columns, errors = [], {"PET from CT": [], "PET from mask and sex": [], "the training PETs' mean": []}
    train_mean = np.mean([_masked_means(case) for case in load_cases(config) if case.split == "train"], axis=0)
    for number, case in enumerate(cases):
        assert case.mask is not None
        real = {name: read_volume(path).array[0] for name, path in case.images.items()}
        tumor, classes = read_mask(case.mask), {"sex": case.metadata["sex"]}
        from_ct, from_mask = (
            pipe(
                mask=case.mask,
                classes=classes,
                image=image,
                generator=torch.Generator().manual_seed(SEED + number),
                output_type="np",
            ).volumes[0]
            for image in ({"ct": case.images["ct"]}, None)
        )
        inside = tumor.array[0] > 0
        expected = np.where(inside, *train_mean)
        guesses = {
            "PET from CT": from_ct[1],
            "PET from mask and sex": from_mask[1],
            "the training PETs' mean": expected,
        }
        truth = real["pet"].clip(*windows["pet"])
        for name, guess in guesses.items():
            errors[name].append([abs(guess - truth).mean(), guess[inside].mean() - truth[inside].mean()])
        if number < 4:
            shown = {
                "real CT": real["ct"],
                "real PET": real["pet"],
                "PET from CT": from_ct[1],
                "CT from mask": from_mask[0],
                "its PET": from_mask[1],
            }
            column = {"title": f"{case.name}, {classes['sex']}", "images": shown, "spacing": tumor.spacing}
            column["windows"] = {name: windows["pet" if "PET" in name else "ct"] for name in shown}
            columns.append(column | {"mask": tumor.array})
    measured = {}
    for name, values in errors.items():
        whole, bias = np.array(values).T
        measured[name] = {
            "mean absolute error in SUV": float(whole.mean()),
            "mean absolute error of the tumor's mean SUV": float(abs(bias).mean()),
            "patients": len(cases),
        }
    return slices_figure(columns), measured


def edits(pipe: MedVolumePipeline, root: str | None = None) -> tuple[Figure, Measured]:
    """Edit a real test volume: image to image, a regenerated hippocampus, no posterior part, a cavity."""
    config = _data("hippocampus", root)
    case = next(case for case in load_cases(config) if case.split == "test")
    assert case.mask is not None
    (path,), mask_volume = case.images.values(), read_mask(case.mask)
    real, posterior = read_volume(path).array[0], np.argwhere(mask_volume.array[0] == 2)
    middle = posterior[np.abs(posterior - posterior.mean(axis=0)).sum(axis=1).argmin()].tolist()
    whole = mask_volume.replace(labeled_region(mask_volume)[None].astype(np.uint8))
    requests = {
        "strength 0.3": (mask_volume, None, 0.3),
        "strength 0.7": (mask_volume, None, 0.7),
        "hippocampus regenerated": (mask_volume, whole, 1.0),
        "posterior removed": (*remove_lesion(mask_volume, 2, 0), 1.0),
        "cavity of 8 mm": (*insert_lesion(mask_volume, ellipsoid(8, mask_volume.spacing), middle, 0), 1.0),
    }
    editor = MedVolumeEditPipeline.from_pipe(pipe)
    images = {f"{case.name}, real": real}
    measured = {}
    for title, (edited, region, strength) in requests.items():
        (generator,) = seeds(1)
        out = editor(
            mask=edited,
            image=path,
            region=region,
            strength=strength,
            guidance_scale=1.0,
            generator=generator,
            output_type="np",
        ).volumes[0][0]
        images[title] = out
        inside = np.ones(real.shape, bool) if region is None else region.array[0] > 0
        measured[title] = {
            "voxels in the region": float(inside.sum()),
            "mean |change| inside": float(np.abs(out - real)[inside].mean()),
            "voxels changed outside": float((out != real)[~inside].sum()),
        }
        if region is not None:
            measured[title]["border jump"] = border_jump(out, inside)
    columns: list[FigureCase] = [
        {"title": title, "images": {"image": image}, "mask": mask_volume.array, "spacing": mask_volume.spacing}
        for title, image in images.items()
    ]
    return slices_figure(columns), measured


def calls(pipe: MedVolumePipeline) -> tuple[Figure, Measured]:
    """Generate from the same seed and mask with the student in 1, 2 and 4 steps, and with its teacher in 10 and 20.

    Measures the root mean square difference from the teacher's 20 steps in the volume's units, and the seconds.
    """
    mask_volume = read_mask(HIPPOCAMPUS / "masks" / "hippocampus_017.nii.gz")
    teacher = MedVolumePipeline.from_pretrained(HIPPOCAMPUS)
    teacher.set_progress_bar_config(disable=True)
    volumes, measured = {}, {}
    for model, steps in ((teacher, 20), (teacher, 10), (pipe, 4), (pipe, 2), (pipe, 1)):
        for _ in range(2):  # the first prepares the kernels for this grid
            start = time.perf_counter()
            out = model(mask=mask_volume, num_inference_steps=steps, generator=seeds(1), output_type="np")
            seconds = time.perf_counter() - start
        title = f"{'student' if model is pipe else 'teacher'}, {steps} step{'s' * (steps > 1)}"
        volumes[title] = out.volumes[0][0]
        error = volumes[title] - volumes["teacher, 20 steps"]
        measured[title] = {"difference": float(np.sqrt((error**2).mean())), "seconds": seconds}
    columns: list[FigureCase] = [
        {"title": title, "images": {"generated": volume}, "mask": mask_volume.array, "spacing": mask_volume.spacing}
        for title, volume in reversed(volumes.items())
    ]
    return slices_figure(columns), measured


def demo(pipe: MedVolumePipeline) -> tuple[Figure, Measured]:
    """Generate from four masks of test subjects, with the pipeline's own sampling settings."""
    masks = [read_mask(HIPPOCAMPUS / "masks" / f"hippocampus_{name}.nii.gz") for name in ("015", "017", "023", "056")]
    out = pipe(mask=masks, generator=seeds(len(masks)), output_type="np")
    columns, measured = [], {}
    for number, (mask_volume, volume) in enumerate(zip(masks, out.volumes, strict=True)):
        title, inside = f"test subject {number + 1}", mask_volume.array[0] > 0
        measured[title] = {"mean inside the mask": float(volume[0][inside].mean())}
        columns.append(
            {
                "title": title,
                "images": {"generated": volume[0]},
                "mask": mask_volume.array,
                "spacing": mask_volume.spacing,
            }
        )
    return slices_figure(columns), measured


def _masked_means(case: Case) -> tuple[float, float]:
    """Return the mean SUV, clipped at 10, in the tumor and around it."""
    assert case.mask is not None
    pet, inside = read_volume(case.images["pet"]).array[0].clip(0, 10), read_mask(case.mask).array[0] > 0
    return float(pet[inside].mean()), float(pet[~inside].mean())


PICTURES: dict[str, tuple[Callable[..., tuple[Figure, Measured]], Path]] = {
    "mask": (mask, HIPPOCAMPUS),
    "edits": (edits, HIPPOCAMPUS),
    "classes": (classes, ROOT / "weights" / "adrenal-shapes"),
    "images": (images, ROOT / "output" / "sarcoma" / "ldm" / "pipeline"),
    "numbers": (numbers, ROOT / "output" / "phantom" / "conditions" / "pipeline"),
    "calls": (calls, STUDENT),
    "demo": (demo, HIPPOCAMPUS),
}

assert set(NAMES) == set(PICTURES)  # --help lists them before they are defined


def main(args: Sequence[str] | None = None) -> None:
    """Draw one picture, and write it and what was measured."""
    options = parse(args)
    draw, folder = PICTURES[options.picture]
    pipe = MedVolumePipeline.from_pretrained(options.pipeline or folder)
    pipe.set_progress_bar_config(disable=True)
    figure, measured = draw(pipe, options.root) if options.picture in OF_VOLUMES else draw(pipe)
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / f"{options.picture}.png", dpi=110)
    report = {"measured": measured, "model": pipe.model_hash, "seed": SEED, **provenance()}
    write_report(options.output / f"{options.picture}.json", report)
    for name, values in measured.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.4g}" for what, value in values.items()))
    print(options.output / f"{options.picture}.png")
