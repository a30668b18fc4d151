"""Volumes from masks, from a table of conditions, or from nothing, to disk, in one process or many:

python generate.py --pipeline weights/hippocampus --masks 'masks/*.nii.gz' --output out/generated --count 2 --steps 20
python generate.py --pipeline DIR --conditions table.csv --output out/generated     # a model with classes, numbers, images
python generate.py --pipeline DIR --output out/generated --count 100        # a model that needs neither masks nor conditions
python generate.py --pipeline weights/hippocampus --masks generate:weights/hippocampus-masks --count 100 --output out/pairs
accelerate launch generate.py ...       # divides masks, rows or volumes over the processes (on a CPU: torchrun)

Writes <name>_<k:03d>.nii.gz on the mask's grid, a JSON sidecar that says how it was made, and at the end manifest.csv.
Of a model of several channels it writes <name>_<k:03d>_<channel>.nii.gz for each that is generated, and one sidecar.
The name is the mask's stem. The columns of a table are: mask (a path, relative to the table's folder; without it and
without an image, give --shape), the model's classes and numbers (an empty cell leaves one out), the channels that it can
be given (paths too; the others are generated to match), and name, if the mask's stem is not to be it.
Each volume's seed comes from --seed, its name and k alone, so batch size, order, processes and interruptions change
nothing. The same command again goes on where it stopped.

With `--masks generate:PIPELINE` that pipeline draws --count label maps first, into OUTPUT/masks; each gets one volume.
Without masks and conditions volumes are called volume_000, label maps map_000, and lie on --shape, or on grids of the sizes
that training maps had. A label map that is broken (a label missing, in pieces, or cut off at the edge, as none of the
training set is) is made again from a next seed; its sidecar says so.

With --reject_copies (a file that `python -m evaluation.copies.fingerprints` makes) a volume that is too similar to one that the model
learned from is not written, but made again from a next seed; sidecars and manifest say which were.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command
from cli.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveInt,
    show_ranges,
)

GENERATE = "generate:"
PRECISIONS = ("no", "bf16", "fp16")
MOST_VOLUMES = 100_000  # of one command; file systems and manifests of more are no longer of use


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with a message on what cannot be."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", required=True, help="pipeline folder or Hub repository")
    parser.add_argument("--lora", help="LoRA for the pipeline, a file or folder of train_ldm.py")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--masks", nargs="+", metavar="DIR_OR_GLOB", help=f"NIfTI label maps, or {GENERATE}PIPELINE to draw them first"
    )
    source.add_argument("--conditions", metavar="TABLE", help="CSV (or JSON), or its URL: a row a volume, see above")
    parser.add_argument(
        "--shape", nargs=3, type=Number(PositiveInt), metavar=("X", "Y", "Z"), help="voxels, where no mask has them"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--count", type=Number(PositiveInt), default=1, help="volumes a mask or row, or in all (1)")
    parser.add_argument("--steps", type=Number(PositiveInt), default=20, help="denoising steps (20)")
    parser.add_argument(
        "--guidance_scale",
        type=Number(NonNegativeFloat),
        default=1.0,
        help="how closely conditions are followed, for models trained for it; 0 to 1 is no guidance (1)",
    )
    parser.add_argument("--seed", type=Number(NonNegativeInt), default=0, help="(0)")
    parser.add_argument("--batch_size", type=Number(PositiveInt), default=8, help="volumes denoised together (8)")
    parser.add_argument(
        "--label_map",
        nargs="+",
        type=label_pair,
        default=[],
        metavar="VALUE=LABEL",
        help="read a label value as one that the model knows, by value or name: 3=1 4=tumor",
    )
    parser.add_argument(
        "--reject_copies",
        type=Path,
        metavar="FINGERPRINTS",
        help="make volumes again that are copies of training volumes, by this file of `python -m evaluation.copies.fingerprints`",
    )
    parser.add_argument(
        "--max_attempts",
        type=Number(PositiveInt),
        default=10,
        help="refused volumes after which one is given up (10)",
    )
    parser.add_argument(
        "--wait_minutes",
        type=Number(NonNegativeFloat),
        default=0.0,
        help="how long to wait for another process that writes to --output; 0 refuses at once (0)",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="no is float32 (no)")
    show_ranges(parser)
    options = parser.parse_args(args)
    options.label_map = dict(options.label_map)
    if options.count > MOST_VOLUMES:
        parser.error(f"--count {options.count}: {TOO_MANY}")
    options.masks_by = None
    if options.masks and any(one.startswith(GENERATE) for one in options.masks):
        if len(options.masks) > 1:
            parser.error(f"--masks {' '.join(options.masks)}: {GENERATE}PIPELINE stands alone")
        options.masks_by, options.masks = options.masks[0].removeprefix(GENERATE), None
    return options


TOO_MANY = (
    f"one command generates {MOST_VOLUMES} volumes at most; use several, each with a --seed and an --output of its own"
)


def label_pair(text: str) -> tuple[int, int | str]:
    """VALUE=LABEL, the label by value or by name."""
    value, _, label = text.partition("=")
    if not label:
        raise argparse.ArgumentTypeError(f"{text!r} is not VALUE=LABEL, e.g. 3=1")
    return int(value), int(label) if label.lstrip("-").isdigit() else label


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
from accelerate import PartialState

from cli.live_bar import LiveBar
from cli.stopping import (
    Stopped,
    check_stop,
    finishing,
    stoppable,
)
from files.atomic import refuse_link, remove_leftovers, write_text
from files.documents import read_object
from files.locks import only_writer
from pipelines import (
    Check,
    MedVolumePipeline,
    Rejection,
    check_conditions,
    describe_images,
    describe_mask,
    equal_batches,
    volume_files,
    write_synthetic,
)
from pipelines.inputs.requests import Request, mask_requests, read_requests
from pipelines.storage.finished import left_to_generate
from pipelines.storage.manifest import MANIFEST, check_manifest, write_manifest
from pipelines.storage.trained_on import GENERATED
from training import join_processes, report_peer_failure
from training.engine.output import check_writable, explain_disk_full
from volumes import VoxelError, draw_shape, label_map_fault
from volumes.formats.raw import memory_bytes
from volumes.map_checks import LabelMapStats

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))
MAX_RUN_TIME = timedelta(days=30)  # processes wait this long for each other at the end
MOST_NAME_BYTES = 255  # of a file


@dataclass(frozen=True)
class Task:
    """Volume k of a request: where it goes, what may share a batch with it (the shape of its padded grid), the size asked for
    where no file has one, its seed, and what all volumes of the request and size have in their sidecars."""

    request: Request
    k: int
    path: Path
    shape: tuple[int, int, int]
    size: tuple[int, int, int] | None
    seed: int
    shared: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """The volume's future sidecar."""
        return self.shared | {"seed": self.seed}


def main(args: Sequence[str] | None = None) -> None:
    """Generate what is not there yet."""
    options = parse(args)
    state = join_processes(MAX_RUN_TIME)
    again = "run the same command again: it goes on with what is there"
    with report_peer_failure(state, again), stoppable(again):
        lost = generate_all(options, state)
    state.destroy_process_group()
    if lost:
        raise ValueError("given up, with nothing written of them; all others are finished:\n" + "\n".join(lost))


def generate_all(options: argparse.Namespace, state: PartialState) -> list[str]:
    """`generate`, after the masks if those are to be drawn."""
    if not options.masks_by:
        return generate(options, state)
    drawn = argparse.Namespace(**vars(options))
    drawn.pipeline, drawn.output, drawn.masks_by = options.masks_by, options.output / "masks", None
    drawn.guidance_scale, drawn.label_map, drawn.reject_copies, drawn.lora = 1.0, {}, None, None
    check_same_labels(options)
    check_writable(options.output)
    refuse_link(drawn.output)
    with only_job(options, state):
        lost = generate(drawn, state)
        names = [f"map_{k:03d}.nii.gz" for k in range(options.count)]
        options.masks = [str(drawn.output / name) for name in names if (drawn.output / name).exists()]
        options.count, options.shape = 1, None  # the shape was theirs
        if options.masks:  # one at least was accepted
            lost += generate(options, state, held=True)
    return lost


@contextmanager
def only_job(options: argparse.Namespace, state: PartialState) -> Iterator[None]:
    """Hold --output, for all processes of this job. Raises: OutputInUse if another job writes there."""
    with only_writer(options.output, options.wait_minutes) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield


def generate(options: argparse.Namespace, state: PartialState, *, held: bool = False) -> list[str]:
    """Make this process's part of the volumes. Returns what is to be said of those that were given up.

    Args:
        held: whether this job holds --output already, see `only_job`.
    """
    requests = mask_requests(options.masks, options.output) if options.masks else []
    pipe = MedVolumePipeline.from_pretrained(options.pipeline, dtype=DTYPES[options.precision]).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    if options.lora:
        pipe.load_lora_weights(options.lora)
    if options.conditions:
        requests = read_requests(options.conditions, pipe, options.output)
    elif not options.masks:
        requests = [Request("map" if pipe.data.image_labels else "volume", None)]
    if (total := len(requests) * options.count) > MOST_VOLUMES:
        raise ValueError(
            f"--count {options.count}, for {len(requests)} masks or rows: these are {total} volumes; {TOO_MANY}"
        )
    every, ks = slice(state.process_index, None, state.num_processes), range(options.count)
    requests, ks = (requests[every], ks) if options.conditions or options.masks else (requests, ks[every])
    rejection = load_rejection(pipe, requests, options)
    tasks = plan(pipe, requests, ks, options, rejection)
    check_batches(pipe, tasks, options.batch_size)
    check_writable(options.output)
    with nullcontext() if held else only_job(options, state):
        lost = generate_tasks(pipe, tasks, options, rejection, state)
    return lost


def generate_tasks(
    pipe: MedVolumePipeline,
    tasks: Sequence[Task],
    options: argparse.Namespace,
    rejection: Rejection | None,
    state: PartialState,
) -> list[str]:
    """Make those of this process's volumes that are not finished, and then, as the main process, the manifest. Returns what is to
    be said of those that were given up."""
    todo, lost = left_to_generate(tasks), []
    if state.is_main_process:
        check_manifest(options.output)
        remove_leftovers(options.output)
        write_subjects(pipe, options.output)
    state.wait_for_everyone()  # what one refuses ends all before hours of work
    waiting = {task.path for task in todo}
    known = files_of(task for task in tasks if task.path not in waiting)  # read, or written by this process
    quiet = None if state.is_main_process else True
    try:
        with LiveBar(total=len(tasks), initial=len(tasks) - len(todo), desc="volumes", disable=quiet) as bar:
            for indices in equal_batches([task.shape for task in todo], options.batch_size):
                batch = [todo[i] for i in indices]
                names = batch[0].path.name + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
                with finishing(names), explain_disk_full(options.output):
                    if rejection is None:
                        given_up = write_batch(pipe, batch, options)
                    else:
                        given_up = write_accepted(pipe, batch, options, rejection)
                lost += given_up
                known |= set() if given_up else files_of(batch)  # of what is given up, a damaged one may still be there
                bar.update(len(batch))
    except Stopped:
        if state.is_main_process:
            print(f"stopped: {write_manifest(options.output, known)} volumes are in {options.output}", flush=True)
        raise

    state.wait_for_everyone()
    if state.is_main_process:
        count = write_manifest(options.output, known)
        print(f"{count} volumes in {options.output}, listed in {options.output / MANIFEST}")
    return lost


def files_of(tasks: Iterable[Task]) -> set[Path]:
    """The files of their volumes."""
    return {file for task in tasks for file in volume_files(task.path, task.record)}


def check_same_labels(options: argparse.Namespace) -> None:
    """Raises: ValueError unless the pipeline of `--masks generate:` draws label maps, of labels that the other knows."""
    drawn, known = (MedVolumePipeline.from_pretrained(path).data for path in (options.masks_by, options.pipeline))
    if not drawn.image_labels:
        raise ValueError(f"--masks generate:{options.masks_by}: that pipeline makes volumes, not label maps")
    different = {value: name for value, name in drawn.image_labels.items() if known.labels.get(value) != name}
    if different and not options.label_map:
        raise ValueError(
            f"--masks generate:{options.masks_by}: draws {different}, and {options.pipeline} knows {known.labels}; take one "
            "trained on the same labels, or translate with --label_map"
        )


def write_batch(pipe: MedVolumePipeline, batch: Sequence[Task], options: argparse.Namespace) -> list[str]:
    """Generate and write tasks of one shape. Returns what is to be said of those whose voxels no file should hold."""
    try:
        run(pipe, batch, options, [task.path for task in batch])
    except VoxelError as error:  # all others are written
        print(f"not written: {error}", flush=True)
        return str(error).splitlines()
    return []


def run(pipe: MedVolumePipeline, batch: Sequence[Task], options: argparse.Namespace, paths: Any = None) -> Any:
    """The pipeline's output for tasks of one shape, written to `paths` if they are given."""
    return pipe(
        mask=[task.request.mask for task in batch if task.request.mask] or None,
        shape=batch[0].size,
        classes=[task.request.classes for task in batch],
        numbers=[task.request.numbers for task in batch],
        image=[task.request.images for task in batch],
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=[torch.Generator().manual_seed(task.seed) for task in batch],
        label_map=options.label_map,
        batch_size=options.batch_size,
        paths=paths,
    )


def load_rejection(
    pipe: MedVolumePipeline, requests: Sequence[Request], options: argparse.Namespace
) -> Rejection | None:
    """What volumes are checked for: broken label maps, and what --reject_copies asks. Raises: ValueError for fingerprints that
    do not fit, and for given images."""
    checks = []
    if pipe.data.maps is not None:
        checks.append(map_check(pipe.data.maps, pipe.data.image_labels))
    if options.reject_copies is not None:
        from evaluation.copies.fingerprints import copy_check  # here, for it imports what only evaluation needs

        if any(request.images for request in requests):
            raise ValueError("--reject_copies is for volumes whose channels are all generated: leave it out")
        checks.append(copy_check(options.reject_copies, pipe.data, pipe.training_subjects))
    return Rejection(checks, options.max_attempts) if checks else None


def map_check(known: LabelMapStats, names: Mapping[int, str]) -> Check:
    """Whether a generated label map is one that could be: `volumes.label_map_fault`."""

    def judge(image: Any) -> tuple[bool, dict[str, Any]]:
        voxel = float(np.prod(image.header.get_zooms()[:3]))
        fault = label_map_fault(np.asarray(image.dataobj), voxel, names, known)
        return fault is not None, {} if fault is None else {"fault": fault}

    return Check("map_check", judge, lambda found: f"is no such map as the training set's ({found['fault']})")


def write_accepted(
    pipe: MedVolumePipeline, batch: Sequence[Task], options: argparse.Namespace, rejection: Rejection
) -> list[str]:
    """Make the tasks' volumes, those that are copies anew, and write what is none. Returns what is to be said of those
    that were given up."""
    rounds = itertools.count()

    def make(numbers: Sequence[int], seeds: Sequence[int]) -> tuple[Sequence[Any], Sequence[dict[str, Any]]]:
        if next(rounds):
            check_stop()  # what was accepted is written; the same command makes the others, from the same seeds
        again = [replace(batch[number], seed=seed) for number, seed in zip(numbers, seeds, strict=True)]
        try:
            made = run(pipe, again, options)
        except VoxelError as error:
            if len(again) == 1:
                return [None], [{"fault": str(error)}]
            alone = [make([number], [seed]) for number, seed in zip(numbers, seeds, strict=True)]
            return [image for images, _ in alone for image in images], [one for _, records in alone for one in records]
        return made.volumes, made.provenance

    def seed_of(number: int, rejections: int) -> int:
        return volume_seed(options.seed, batch[number].request.name, batch[number].k, rejections)

    lost = []
    for number, image, record in rejection.accepted(make, seed_of, len(batch)):
        if image is None:
            lost.append(rejection.given_up(batch[number].path.name, record))
        else:
            write_synthetic(image, record, batch[number].path)
    return lost


def volume_seed(seed: int, stem: str, k: int, rejections: int = 0) -> int:
    """63 bits of a hash of (seed, stem, k): the same everywhere and always, different for every volume, and for every
    attempt at it."""
    text = f"{seed}/{stem}/{k}" + (f"/{rejections}" if rejections else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def plan(
    pipe: MedVolumePipeline,
    requests: Sequence[Request],
    ks: Sequence[int],
    options: argparse.Namespace,
    rejection: Rejection | None,
) -> list[Task]:
    """Volumes `ks` of each request. Reads every mask once, and checks all conditions, so that what is wrong is found before
    hours of work.

    Raises: ValueError naming all bad masks and rows, or a shape that is missing or has no use.
    """
    if options.shape and any(request.files for request in requests):
        raise ValueError("--shape has no use beside masks and images, which have their own; leave it out")
    tasks, refused = [], []
    for request in requests:
        shape, before, shared = None, None, {}
        for k in ks:
            seed = volume_seed(options.seed, request.name, k)
            size = None if request.files else size_of(pipe, options, seed)
            try:
                if shape is None or size != before:
                    (shape, shared), before = planned(pipe, request, size, options), size
                    shared |= rejection.planned if rejection is not None else {}
                    check_file_names(options.output / f"{request.name}_{ks[-1]:03d}.nii.gz", shared)
            except ValueError as error:
                refused.append(f"{request.name}: {error}")
                break
            path = options.output / f"{request.name}_{k:03d}.nii.gz"
            tasks.append(Task(request, k, path, shape if size is None else size, size, seed, shared))
    if refused:
        raise ValueError("masks or conditions that cannot be used:\n" + "\n".join(refused))
    return tasks


def planned(
    pipe: MedVolumePipeline, request: Request, size: tuple[int, int, int] | None, options: argparse.Namespace
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The padded grid of a request's volumes, and the sidecar that they share, but for the seed. Raises: ValueError for files,
    classes and numbers that cannot be used."""
    prepared = pipe.prepared(request.mask, size, options.label_map, request.images)
    classes, numbers = check_conditions(pipe.unet, pipe.data, request.classes, request.numbers, prepared.grid)
    record = pipe.provenance(
        describe_mask(request.mask) if request.mask else None,
        shape=size,
        seed=None,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        label_map=options.label_map,
        classes=classes,
        numbers=numbers,
        images=describe_images(request.images),
    )
    return prepared.shape, record


def check_file_names(path: Path, record: dict[str, Any]) -> None:
    """Raises: ValueError if a file of the volume has a longer name than file systems take."""
    for file in volume_files(path, record):
        if len(os.fsencode(file.name)) > MOST_NAME_BYTES:
            raise ValueError(
                f"its file {file.name[:40]!r}... would have a name of more than {MOST_NAME_BYTES} bytes; shorten it"
            )


def check_batches(pipe: MedVolumePipeline, tasks: Sequence[Task], batch_size: int) -> None:
    """Raises: ValueError if a batch cannot fit into memory: by its first feature map alone, which is a small part of it."""
    counts = Counter(task.shape for task in tasks)
    device = pipe.device
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
    for shape, count in counts.items():
        cells = math.prod(-(-side // stride) for side, stride in zip(shape, pipe.vae.stride, strict=True))
        volume = cells * pipe.unet.config["channels"][0] * pipe.unet.dtype.itemsize
        together = min(count, batch_size)
        if together * volume > room:
            remedy = f"--batch_size {max(room // volume // 4, 1)}" if volume <= room else "smaller volumes"
            raise ValueError(
                f"{together} volumes of {' x '.join(map(str, shape))} voxels at a time need more than "
                f"{together * volume / 2**30:.0f} GiB of memory, {room / 2**30:.0f} GiB is what there is; ask for {remedy}"
            )


def size_of(pipe: MedVolumePipeline, options: argparse.Namespace, seed: int) -> tuple[int, int, int] | None:
    """What --shape says, or the size of a training map; None where neither is known."""
    if options.shape:
        return tuple(options.shape)
    return None if pipe.data.maps is None else draw_shape(pipe.data.maps, seed)


def write_subjects(pipe: MedVolumePipeline, output: Path) -> None:
    """provenance/training_subjects.json: {hash: records of the training subjects} of each model that has made volumes in the
    folder, by which evaluate.py refuses to judge them on such subjects. None of a model without any record.

    Raises: ValueError for a damaged one, and for a link in the place of its folder."""
    if all("salt" not in record for record in pipe.training_subjects):
        return
    path = output / GENERATED
    refuse_link(path.parent)
    remove_leftovers(path.parent)
    known = read_object(path) if path.is_file() else {}
    found = known | {pipe.model_hash: pipe.training_subjects}
    if found != known:  # evaluate.py measures anew where a file is
        write_text(path, json.dumps(found, indent=1) + "\n")
