"""Many volumes to disk, in one process or many: what is finished stays, the rest is generated, and a manifest lists
all."""

import functools
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState

from cli.live_bar import LiveBar
from cli.stopping import Stopped, check_stop, finishing
from diffusion.guidance import autoguidance_in_effect
from files.atomic import refuse_link, remove_leftovers
from files.locks import only_writer
from files.writable import check_output_folder, explain_disk_full
from pipelines.base import VolumePipeline
from pipelines.checks.label_map import map_check
from pipelines.export.formats import check_exports, export
from pipelines.inputs.case_requests import case_requests
from pipelines.inputs.masks import LabelMap
from pipelines.inputs.prepared import PreparedVolume
from pipelines.inputs.request import Classes, VolumeRequest
from pipelines.inputs.request_files import mask_requests, read_requests
from pipelines.pipeline import MedVolumePipeline
from pipelines.planning import PlannedVolume, check_memory, plan_volumes, prepared_volumes, volume_path, volume_seed
from pipelines.preview import write_preview
from pipelines.rejection import Attempt, Check, Rejection
from pipelines.sampling import SamplingConfig, equal_batches
from pipelines.storage.finished import (
    MANIFEST,
    FinishedVolume,
    check_manifest,
    finished_volumes,
    left_to_generate,
    write_manifest,
)
from pipelines.storage.provenance import write_synthetic
from pipelines.storage.record import GenerationRecord
from pipelines.storage.trained_on import MASKS, write_generated_by
from volumes import DataConfig
from volumes.description import DataDescription

MAX_VOLUMES = 100_000  # of one command; file systems and manifests of more are no longer of use
TOO_MANY = f"one command generates {MAX_VOLUMES} volumes at most; use several, each with its own --seed and --output"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RunConfig(ABC):
    """What all commands that generate have in common, see `generate.py --help`.

    Attributes:
        count: volumes per request.
        unet_weak: folder of the weaker U-Net of autoguidance; None for the pipeline's own.
        exports: (format, folder) of each data set that the volumes are exported to, see `pipelines.export`.
    """

    pipeline: str | Path
    output: Path
    count: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    label_map: LabelMap = field(default_factory=dict)
    lora: str | None = None
    unet_weak: str | None = None
    max_attempts: int = 10
    wait_minutes: float = 0.0
    precision: str = "no"
    exports: Sequence[tuple[str, Path]] = ()
    pipeline_class: ClassVar[type[VolumePipeline]] = MedVolumePipeline

    @abstractmethod
    def requests(
        self, load: Callable[[], VolumePipeline], say: Callable[[str], object] = print
    ) -> Sequence[VolumeRequest]:
        """Return what volumes are generated from.

        Args:
            load: returns the pipeline, which is loaded when it is first needed: it may be a download.
            say: prints a line, once for all processes.
        """

    def rejection(self, pipe: VolumePipeline, requests: Sequence[VolumeRequest]) -> Rejection | None:
        """Return the checks that volumes must pass, if there are any."""
        return None


@dataclass(frozen=True)
class BatchConfig(RunConfig):
    """One generation command.

    Attributes:
        classes: of all volumes, where a row or a case has none.
        shape, spacing: of the volumes, where no file sets them.
        masks: folders, patterns or files; without them, `conditions` and `data`, `count` volumes are generated.
        mask_pipeline: a pipeline that generates `count` masks first.
        conditions: a table.
        data: a data set; the masks and conditions of its cases in `splits` are taken.
        copy_check: makes the check for copies of training volumes, for the pipeline that it is given.
    """

    classes: Classes = field(default_factory=dict)
    shape: Sequence[int] | None = None
    spacing: Sequence[float] | None = None
    masks: Sequence[str] = ()
    mask_pipeline: str | None = None
    conditions: str | Path | None = None
    data: DataConfig | None = None
    splits: Sequence[str] = ()
    copy_check: Callable[[VolumePipeline], Check] | None = None

    def requests(
        self, load: Callable[[], VolumePipeline], say: Callable[[str], object] = print
    ) -> Sequence[VolumeRequest]:
        """Return the requests of the masks, the table or the cases, or one that names nothing.

        Raises: ValueError for a shape beside files that have their own.
        """
        requests = self._sources(load, say)
        if self.shape and any(request.files for request in requests):
            raise ValueError("--shape has no use beside masks and images, which have their own; leave it out")
        own = {"shape": self.shape, "spacing": self.spacing}
        return [replace(request, classes={**self.classes, **request.classes}, **own) for request in requests]

    def _sources(self, load: Callable[[], VolumePipeline], say: Callable[[str], object]) -> Sequence[VolumeRequest]:
        if self.mask_pipeline is not None:
            raise ValueError("a config with a mask_pipeline is for generate_with_masks, which generates masks first")
        if self.masks:
            return mask_requests(self.masks, self.output)
        if self.conditions:
            return read_requests(self.conditions, load(), self.output, say)
        if self.data is not None:
            return case_requests(self.data, self.splits, load(), self.output, self.label_map)
        return [VolumeRequest(name="map" if load().data.image_labels else "volume")]

    def rejection(self, pipe: VolumePipeline, requests: Sequence[VolumeRequest]) -> Rejection | None:
        """Return the checks for broken label maps, and for copies of training volumes.

        Raises: ValueError for fingerprints that do not fit, or volumes that are not generated whole.
        """
        if self.copy_check is not None and any(request.images for request in requests):
            raise ValueError("--reject_copies is for volumes whose channels are all generated: leave it out")
        return load_rejection(pipe, self)


def generate_to_disk(
    config: RunConfig, state: PartialState, *, loaded: VolumePipeline | None = None, held: bool = False
) -> list[str]:
    """Generate this process's share of the volumes of a command that are not finished. The main process then writes the
    manifest, the preview and the exports, of the finished volumes of all processes.

    Args:
        loaded: the command's pipeline, if it is loaded already.
        held: whether this job holds the output folder already, see `only_job`.
    Returns: one line per volume that was not written: rejected too often, or with voxels that no file can hold.
    Raises: ValueError for what cannot be used, before the first step; for files that change later, once the manifest
    is written.
    """
    load = functools.cache(lambda: loaded or load_pipeline(config, state.device))
    requests = config.requests(load, state.print)
    pipe = load()
    check_count(requests, config.count)
    rejection = config.rejection(pipe, requests)
    requests = [with_options(request, config) for request in requests]
    partial = pipe.denoiser.takes_partial_masks
    check_exports(config.exports, config.output, pipe.data, requests, config.count, partial=partial)
    sources = {volume_path(config.output, one.name, k): one for one in requests for k in range(config.count)}
    requests, ks = share_of(requests, config.count, state)
    sampling, missing = config.sampling, []
    tasks = plan_volumes(pipe, requests, ks, sampling, rejection, seed=config.seed, output=config.output)
    check_memory(pipe, tasks, sampling.batch_size)
    check_output_folder(config.output)
    with nullcontext() if held else only_job(config, state):
        todo = left_to_generate(tasks)
        prepare_folder(pipe, config.output, state)
        waiting = {task.path for task in todo}
        known = files_of(task for task in tasks if task.path not in waiting)  # read, or written by this process
        with listing(config.output, known, state) as finished, volume_bar(len(tasks), len(todo), state) as bar:
            for numbers in equal_batches([task.batch_key for task in todo], sampling.batch_size):
                batch = [todo[number] for number in numbers]
                with finishing(names_of(batch)), explain_disk_full(config.output):
                    volumes = prepared_volumes(pipe, batch, sampling)
                    if rejection is None:
                        generators, paths = generators_of(task.seed for task in batch), [task.path for task in batch]
                        samples = pipe.generate(volumes, sampling, generators, paths=paths)
                        faults = [sample.fault for sample in samples if sample.fault is not None]
                    else:
                        faults = generate_accepted(pipe, batch, volumes, rejection, config)
                missing += faults
                if faults:
                    print("not written: " + "\n".join(faults), flush=True)
                else:  # of a volume that was not written, a damaged one may still be there
                    known |= files_of(batch)
                bar.update(len(batch))
        if state.is_main_process:
            ours = [FinishedVolume(path, record, sources[path]) for path, record in finished if path in sources]
            write_preview(ours, pipe.data, config.output)
            for kind, folder in config.exports:
                export(kind, folder, ours, pipe.data)
    return missing


def generate_with_masks(config: BatchConfig, state: PartialState) -> list[str]:
    """`generate_to_disk` of the masks of `config.mask_pipeline`, into OUTPUT/masks, and then of their volumes."""
    assert config.mask_pipeline is not None
    folder = config.output / MASKS
    of_masks = replace(
        config,
        pipeline=config.mask_pipeline,
        mask_pipeline=None,
        output=folder,
        sampling=replace(  # guidance is that of the volumes
            config.sampling,
            guidance_scale=None,
            guidance_interval=None,
            autoguidance_scale=None,
            guidance_without=None,
            without_scale=None,
        ),
        label_map={},
        classes={},
        lora=None,
        unet_weak=None,
        copy_check=None,
        exports=(),
    )
    check_count([config.mask_pipeline], config.count)
    data = check_same_labels(config)
    names = [f"map_{k:03d}" for k in range(config.count)]
    masks_to_be = [VolumeRequest(folder / f"{name}.nii.gz", name=name) for name in names]
    check_exports(config.exports, folder, data, masks_to_be, 1)
    check_output_folder(config.output)
    refuse_link(folder)
    with only_job(config, state):
        missing = generate_to_disk(of_masks, state)
        files = [folder / f"{name}.nii.gz" for name in names]
        masks = [str(file) for file in files if file.exists()]
        if masks:  # at least one was accepted
            of_volumes = replace(config, masks=masks, mask_pipeline=None, count=1, shape=None, spacing=None)  # theirs
            missing += generate_to_disk(of_volumes, state, held=True)
    return missing


def with_options(request: VolumeRequest, config: RunConfig) -> VolumeRequest:
    """The request with the label map of the command."""
    label_map = dict([*pairs(request.label_map), *pairs(config.label_map)])
    return replace(request, label_map=label_map)


def pairs(label_map: LabelMap | None) -> list[tuple[int | str, int | str]]:
    """The entries of a label map."""
    return [] if label_map is None else [*label_map.items()]


@contextmanager
def only_job(config: RunConfig, state: PartialState) -> Iterator[None]:
    """Hold the output folder, for all processes of this job. Raises: OutputInUse if another job writes there."""
    with only_writer(config.output, config.wait_minutes) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield


def load_pipeline(config: RunConfig, device: torch.device | None) -> VolumePipeline:
    """The pipeline of a command, with its LoRA, ready to generate."""
    pipe = config.pipeline_class.from_pretrained(config.pipeline, dtype=DTYPES[config.precision]).to(device)
    pipe.set_progress_bar_config(disable=True)
    if config.lora:
        pipe.load_lora_weights(config.lora)
    if config.unet_weak:
        pipe.load_unet_weak(config.unet_weak)
        scale = config.sampling.filled(pipe.sampling_settings).autoguidance_scale
        if autoguidance_in_effect(scale) == 1:
            warnings.warn(
                f"--unet_weak {config.unet_weak}: autoguidance_scale is 1, so it guides nothing; add "
                "--autoguidance_scale, such as 1.5",
                stacklevel=2,
            )
    return pipe


def check_count(requests: Sequence[object], count: int) -> None:
    """Raises: ValueError for more volumes than one command generates."""
    total = len(requests) * count
    if total > MAX_VOLUMES:
        raise ValueError(f"--count {count}, for {len(requests)} masks or rows: these are {total} volumes; {TOO_MANY}")


def check_same_labels(config: BatchConfig) -> DataDescription:
    """Return the description of what the pipeline of the volumes was trained on. Raises: ValueError unless the mask
    pipeline generates label maps, of labels that the other pipeline knows."""
    assert config.mask_pipeline is not None
    sources = (config.mask_pipeline, config.pipeline)
    of_masks, of_volumes = (MedVolumePipeline.from_pretrained(source).data for source in sources)
    labels = of_masks.image_labels
    if not labels:
        raise ValueError(f"--masks generate:{config.mask_pipeline}: that pipeline generates volumes, not label maps")
    if not config.label_map and any(of_volumes.labels.get(value) != name for value, name in labels.items()):
        raise ValueError(
            f"--masks generate:{config.mask_pipeline}: generates {labels}, and {config.pipeline} knows "
            f"{of_volumes.labels}; take one trained on the same labels, or translate with --label_map"
        )
    return of_volumes


def load_rejection(pipe: VolumePipeline, config: BatchConfig) -> Rejection | None:
    """The checks of the volumes: for broken label maps, and for copies if --reject_copies says so. Raises: ValueError
    for fingerprints that do not fit."""
    data = pipe.data
    checks = [] if data.maps is None else [map_check(data.maps, data.image_labels)]
    if config.copy_check is not None:
        checks.append(config.copy_check(pipe))
    return Rejection(checks, config.max_attempts) if checks else None


def prepare_folder(pipe: VolumePipeline, output: Path, state: PartialState) -> None:
    """Tidy the output folder, and record there whose volumes the model learned from; by the main process, for all.
    Raises: ValueError for a manifest that is not ours."""
    if state.is_main_process:
        check_manifest(output)
        remove_leftovers(output)
        write_generated_by(pipe, output)
    state.wait_for_everyone()  # what one refuses ends all before hours of work


def volume_bar(total: int, left: int, state: PartialState) -> LiveBar:
    """The progress bar of this process's volumes; only the main process shows one."""
    return LiveBar(total=total, initial=total - left, desc="volumes", disable=None if state.is_main_process else True)


@contextmanager
def listing(
    output: Path, known: Collection[Path], state: PartialState
) -> Iterator[list[tuple[Path, GenerationRecord]]]:
    """Write the manifest when all processes have left the block; also when a signal or an error ended it, so that what
    is finished is listed. Yields a list that holds the finished volumes of the folder after the block, in the main
    process.

    Args:
        known: files whose digests need not be computed again; the block adds to them.
    """
    finished: list[tuple[Path, GenerationRecord]] = []
    try:
        yield finished
        state.wait_for_everyone()
    except (Stopped, Exception) as error:
        if state.is_main_process:
            try:
                print(f"stopped: {write_manifest(output, known)} volumes are in {output}", flush=True)
            except OSError as full:
                error.add_note(f"{output / MANIFEST} could not be written: {full.strerror or full}")
        raise
    if state.is_main_process:
        finished += finished_volumes(output, known=known)
        count = write_manifest(output, known, finished)
        print(f"{count} volumes in {output}, listed in {output / MANIFEST}")


def share_of(
    requests: Sequence[VolumeRequest], count: int, state: PartialState
) -> tuple[Sequence[VolumeRequest], Sequence[int]]:
    """This process's requests and the numbers of their volumes: its share of the requests, or of the volumes of one."""
    share = slice(state.process_index, None, state.num_processes)
    return (requests[share], range(count)) if len(requests) > 1 else (requests, range(count)[share])


def names_of(batch: Sequence[PlannedVolume]) -> str:
    """The names of a batch, for messages."""
    return batch[0].path.name + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")


def files_of(tasks: Iterable[PlannedVolume]) -> set[Path]:
    """The files of their volumes."""
    return {file for task in tasks for file in task.files}


def generate_accepted(
    pipe: VolumePipeline,
    batch: Sequence[PlannedVolume],
    volumes: Sequence[PreparedVolume],
    rejection: Rejection,
    config: RunConfig,
) -> list[str]:
    """Generate volumes of one shape until the checks accept them, and write them. Returns: one line per volume that was
    not written."""
    rounds = itertools.count()

    def sample(numbers: Sequence[int], seeds: Sequence[int]) -> list[Attempt]:
        if next(rounds):
            check_stop()  # what was accepted is written; the same command generates the others, from the same seeds
        samples = pipe.generate([volumes[number] for number in numbers], config.sampling, generators_of(seeds))
        return [Attempt(sample.output, sample.record, sample.fault) for sample in samples]

    def seed_of(number: int, rejections: int) -> int:
        return volume_seed(config.seed, batch[number].request.name, batch[number].k, rejections)

    missing = []
    for outcome in rejection.sample_until_accepted(len(batch), sample, seed_of):
        path = batch[outcome.number].path
        if outcome.accepted is None:
            missing.append(f"{path.name}: {outcome.reason}")
        else:
            write_synthetic(outcome.accepted.image, outcome.accepted.record.to_json(), path)
    return missing


def generators_of(seeds: Iterable[int]) -> list[torch.Generator]:
    """A generator of each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
