r"""Measure whether one can see where an image was edited: real volumes with a regenerated region, its border, and the
voxels outside:

    python -m evaluation.studies.edit_borders --config configs/hippocampus/ldm.yaml \
        --pipeline weights/hippocampus --output out/editing.json

The jump is the mean |difference| between the two voxels on either side of the region's border (they share a face), over
that between voxels next to them, just inside and just outside, across faces parallel to these. A jump of 1 means no
edge; the figure of the untouched volume is reported beside it. Regions: a box in the middle, half of each side, and the
labels of the mask with 3 mm more on each side. Intervals are of 95 %, over subjects.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

from jsonargparse import Namespace

from cli.command import run_command
from cli.settings import (
    NonNegativeFloat,
    Number,
    PositiveInt,
    PositiveShare,
    Seed,
)
from evaluation.report import add_overlap_argument, config_parser

REGION_NAMES = ("box", "labeled")


def parse(args: Sequence[str] | None) -> Namespace:
    """Parse the command line, with the data section of `--config` as the defaults of `--data.*`."""
    parser = config_parser("evaluation.studies.edit_borders", __doc__, args)
    parser.add_argument("--pipeline", type=str, required=True, help="pipeline folder")
    parser.add_argument("--output", type=str, required=True, help="report to write, a JSON file")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test")
    add_overlap_argument(parser)
    parser.add_argument(
        "--count", type=Number(PositiveInt), help="number of volumes, the first of the split; default: all"
    )
    parser.add_argument(
        "--regions", nargs="+", choices=REGION_NAMES, default=list(REGION_NAMES), help="regions to edit"
    )
    parser.add_argument(
        "--strength", type=Number(PositiveShare), default=1.0, help="strength of the edit, see the pipeline"
    )
    parser.add_argument(
        "--blend_margin",
        type=Number(NonNegativeFloat),
        help="mm of blending inside the border; default: the pipeline's",
    )
    parser.add_argument("--steps", type=Number(PositiveInt), default=20, help="denoising steps")
    parser.add_argument("--seed", type=Number(Seed), default=0, help="seed of the noise (0)")
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: cpu")
    parsed = parser.instantiate(parser.parse_args(None if args is None else list(args)))
    assert isinstance(parsed, Namespace)
    return parsed


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch

from cli.live_bar import LiveBar
from evaluation.data.seen import check_pipeline
from evaluation.report import check_report, provenance, write_report
from evaluation.stats.bootstrap import interval_of, resample_subjects
from pipelines import MedVolumeEditPipeline, MedVolumePipeline
from pipelines.inputs.inpainting import BLEND_MARGIN_MM
from volumes import Case, Volume, load_cases, read_mask, read_volume
from volumes.devices import find_device
from volumes.foreground import box_from_json
from volumes.lesions import grown

AROUND = 3.0  # mm by which the region exceeds the labels
DEPTHS = (-2, -1, 0, 1, 2)  # steps from the border's faces inwards


def box_region(mask: Volume) -> np.ndarray:
    """Mark a box of half of each side, in the middle: bool (X, Y, Z)."""
    region = np.zeros(mask.shape, bool)
    x, y, z = (slice(n // 4, n // 4 + n // 2) for n in mask.shape)
    region[x, y, z] = True
    return region


def labeled_region(mask: Volume) -> np.ndarray:
    """Mark the labeled voxels, and 3 mm more: bool (X, Y, Z)."""
    return grown(mask.array[0] > 0, AROUND, mask.spacing)


REGIONS: dict[str, Callable[[Volume], np.ndarray]] = {"box": box_region, "labeled": labeled_region}


def face_differences(volume: np.ndarray, region: np.ndarray, steps: int = 0) -> np.ndarray:
    """Compute |differences| (n,) between voxels that share a face parallel to the region's border, `steps` faces
    inwards of it: 0 is across the border, -1 just outside, 1 just inside.

    Faces count if the line across the border stays on its side: inside the region `steps` inwards, outside of it
    outwards.
    """
    differences = []
    for axis in range(3):
        lines, inside = np.moveaxis(volume, axis, 0), np.moveaxis(region, axis, 0)
        for outwards in (1, -1):  # the border is crossed toward higher, then lower indices
            along, here = lines[::outwards], inside[::outwards]
            for place in range(1, len(along)):
                crossed = here[place - 1] & ~here[place]  # the first voxel outside is at `place`
                low, high = place - 1 - steps, place - steps  # the pair to compare
                if low < 0 or high >= len(along):
                    continue
                between = here[min(low, place - 1) : max(high, place) + 1]
                expected = np.arange(min(low, place - 1), max(high, place) + 1) < place
                pure = crossed & (between == expected[:, None, None]).all(axis=0)
                differences.append(np.abs(along[high][pure].astype(float) - along[low][pure]))
    return np.concatenate(differences)


def border_jump(volume: np.ndarray, region: np.ndarray) -> float:
    """Divide the mean |difference| across the region's border by that across parallel faces one voxel inside and
    outside.

    Both arrays are (X, Y, Z). Raises: ValueError for a region without a border.
    """
    across, inside, outside = (face_differences(volume, region, steps) for steps in (0, 1, -1))
    beside = np.concatenate([inside, outside])
    if not across.size or not beside.mean():
        raise ValueError("the region has no border, or the volume is constant beside it; choose another")
    return float(across.mean() / beside.mean())


def profile(volume: np.ndarray, region: np.ndarray) -> list[float]:
    """Compute the mean |difference| across the faces at each of `DEPTHS`."""
    return [float(face_differences(volume, region, steps).mean()) for steps in DEPTHS]


class EditedCase(TypedDict):
    """Figures of one edited volume and of the untouched one, and which voxels changed."""

    case: str
    jump: float
    untouched: float
    profile: list[float]
    untouched_profile: list[float]
    changed_outside: int
    changed_inside: float


class Jump(TypedDict):
    """A mean over volumes, its interval over subjects, and the largest of the volumes."""

    mean: float
    interval: list[float]
    largest: float


class RegionReport(TypedDict):
    """All cases with one region: means, and the rows."""

    volumes: int
    subjects: int
    jump: Jump
    untouched: Jump
    profile: list[float]
    untouched_profile: list[float]
    changed_outside: int
    changed_inside: float
    rows: list[EditedCase]


def measure(pipe: MedVolumeEditPipeline, cases: Sequence[Case], options: Namespace) -> dict[str, RegionReport]:
    """Edit each region of each case: jumps, profiles, and the number of voxels that changed outside the region."""
    rows: dict[str, list[EditedCase]] = {name: [] for name in options.regions}
    for case in LiveBar(cases, unit="volume", disable=None):
        assert case.mask is not None
        (path,) = case.images.values()
        image = read_volume(path, exact=True, **options.data.reading)
        mask, original = read_mask(case.mask, like=image, **options.data.mask_reading), image.array[0]
        for name in options.regions:
            region = REGIONS[name](mask)
            output = pipe(
                mask=case.mask,
                image=path,
                region=mask.replace(region[None].astype(np.uint8)),
                strength=options.strength,
                blend_margin=options.blend_margin,
                num_inference_steps=options.steps,
                guidance_scale=1.0,  # as the published figures, whatever the pipeline's own
                generator=torch.Generator().manual_seed(options.seed),
            )
            edited = read_volume(output.volumes[0], exact=True).array[0]
            if box := output.provenance[0].get("box"):  # data.crop: what lies outside is not generated
                placement = box_from_json(box)
                region &= placement.undo(np.ones(placement.target, bool), False)
            rows[name].append(
                {
                    "case": case.name,
                    "jump": border_jump(edited, region),
                    "untouched": border_jump(original, region),
                    "profile": profile(edited, region),
                    "untouched_profile": profile(original, region),
                    "changed_outside": int((edited != original)[~region].sum()),
                    "changed_inside": float((edited != original)[region].mean()),
                }
            )
    return {name: summarize_region(of_region, [case.subject for case in cases]) for name, of_region in rows.items()}


def summarize_region(rows: Sequence[EditedCase], subjects: Sequence[str]) -> RegionReport:
    """Take means over volumes with intervals over subjects."""
    counts = resample_subjects(subjects, np.random.default_rng(0), one_by_one=True)

    def jump(values: np.ndarray) -> Jump:
        interval = interval_of(counts @ values / counts.sum(1))
        return {"mean": float(values.mean()), "interval": interval, "largest": float(values.max())}

    return {
        "volumes": len(rows),
        "subjects": len(set(subjects)),
        "jump": jump(np.array([row["jump"] for row in rows])),
        "untouched": jump(np.array([row["untouched"] for row in rows])),
        "profile": np.mean([row["profile"] for row in rows], axis=0).tolist(),
        "untouched_profile": np.mean([row["untouched_profile"] for row in rows], axis=0).tolist(),
        "changed_outside": sum(row["changed_outside"] for row in rows),
        "changed_inside": float(np.mean([row["changed_inside"] for row in rows])),
        "rows": list(rows),
    }


def main(args: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, write the report and return it."""
    options = parse(args)
    device = find_device(options.device or "cpu")
    options.blend_margin = BLEND_MARGIN_MM if options.blend_margin is None else options.blend_margin
    cases = [case for case in load_cases(options.data) if case.split == options.split and case.mask is not None]
    if not cases:
        raise ValueError(f"no case of split {options.split!r} has files of image and mask; see `data` in the config")
    check_report(options.output)
    cases = cases[: options.count]
    pipe = MedVolumePipeline.from_pretrained(options.pipeline)
    if len(pipe.data.channels) > 1:
        raise ValueError(f"the jump is measured for one channel, the model generates {list(pipe.data.channels)}")
    check_pipeline(pipe, options.data, cases, options.pipeline, accepted=options.accept_overlap)
    editor = MedVolumeEditPipeline.from_pipe(pipe.to(device))
    editor.set_progress_bar_config(disable=True)
    result = measure(editor, cases, options)
    settings = {key: options[key] for key in ("pipeline", "split", "strength", "blend_margin", "steps", "seed")}
    report = {"evaluation": "editing", "settings": settings, "depths": list(DEPTHS), "regions": result, **provenance()}
    write_report(options.output, report)
    for name, region in result.items():
        jump, untouched = region["jump"], region["untouched"]
        print(
            f"{name}: jump {jump['mean']:.3f} ({jump['interval'][0]:.3f} to {jump['interval'][1]:.3f}), at most "
            f"{jump['largest']:.3f}; untouched {untouched['mean']:.3f}; {region['changed_outside']} voxels changed "
            f"outside, {region['volumes']} volumes of {region['subjects']} subjects"
        )
    print(f"report: {options.output}")
    return report
