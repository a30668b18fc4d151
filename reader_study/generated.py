"""Volumes that are generated for a study: by the steps of `medvolume generate`, which resumes what was interrupted."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import PartialState

from files.shipped import expand_path
from pipelines.base import VolumePipeline
from pipelines.batch_generation import BatchConfig, generate_to_disk, load_pipeline
from pipelines.inputs.request import VolumeRequest
from pipelines.planning import volume_path
from training import run_together
from volumes.formats.read import is_volume_name

from .design import REAL

EXAMPLES = "examples.csv"  # in the folder of a pipeline


def generated_folder(output: Path, name: str) -> Path:
    """Return the folder of the volumes of a model: beside the study, because a folder of the study goes to readers."""
    return output.with_name(f"{output.name}-generated") / name


def generate_for_study(pipelines: Mapping[str, str], masks: Sequence[str], output: Path, seed: int) -> dict[str, Path]:
    """Generate one volume of each mask with each pipeline, by the settings of its sampling.json.

    Args:
        pipelines: folder, shipped:NAME or repository of each model, by its name in the study.
        masks: folders, patterns or files; none: the masks and conditions of the pipeline's examples.csv.
        output: folder of the study.
        seed: of the volumes, as of `medvolume generate`.
    Returns: the folder of each model's volumes.
    Raises: ValueError for a name that cannot be a folder's, a pipeline without examples where no masks are given, one
        whose volumes have several channels or are label maps, and a folder with volumes of another command.
    """
    configs = {name: _config(name, where, masks, output, seed) for name, where in pipelines.items()}

    def work(state: PartialState) -> list[str]:
        missing: list[str] = []
        for config in configs.values():
            pipe = load_pipeline(config, state.device)
            _check(pipe, config)
            _check_only(config.output, [request.name for request in _requests(config, pipe)])
            missing += generate_to_disk(config, state, loaded=pipe)
        return missing

    run_together(work)
    return {name: config.output for name, config in configs.items()}


def _config(name: str, where: str, masks: Sequence[str], output: Path, seed: int) -> BatchConfig:
    if name in (REAL, "", "..") or Path(name).name != name:
        raise ValueError(f"--pipeline {name}={where}: {name!r} names no model; take a word, such as teacher={where}")
    pipeline = expand_path(where)
    examples = Path(pipeline) / EXAMPLES
    if not masks and not examples.is_file():
        raise ValueError(
            f"--pipeline {where}: has no {EXAMPLES}, so nothing says what to generate from; give --masks, or generate "
            "volumes first (`medvolume generate`) and give their folder as --generated"
        )
    return BatchConfig(
        pipeline,
        generated_folder(output, name),
        seed=seed,
        masks=masks,
        conditions=None if masks else examples,
    )


def _requests(config: BatchConfig, pipe: VolumePipeline) -> Sequence[VolumeRequest]:
    return config.requests(lambda: pipe, say=lambda _: None)


def _check_only(folder: Path, names: Sequence[str]) -> None:
    """Raise ValueError for volumes in the folder that are not those of these names: readers would see them, too."""
    planned = {volume_path(folder, name, 0).name for name in names}
    there = [path.name for path in folder.glob("*") if is_volume_name(path.name)]
    if others := sorted(set(there) - planned):
        raise ValueError(
            f"{folder}: holds volumes of another command ({', '.join(others[:3])}); remove the folder, or give another "
            "--output"
        )


def _check(pipe: VolumePipeline, config: BatchConfig) -> None:
    """Raises: ValueError for a pipeline whose volumes readers cannot be shown."""
    if pipe.data.image_labels:
        raise ValueError(f"--pipeline {config.pipeline}: generates label maps; give a pipeline of images")
    if len(pipe.data.channels) > 1:
        raise ValueError(
            f"--pipeline {config.pipeline}: generates the channels {', '.join(pipe.data.channels)}, and readers see "
            "one; generate volumes first (`medvolume generate`), and give a folder of one channel as --generated"
        )
