"""Check that a model was not trained on the volumes that test it, and that its training volumes were prepared like
these."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.storage.trained_on import TrainedOn, read_generated, read_model
from volumes import Case, DataConfig, VolumeError, load_cases, volume_parts
from volumes.data.case_files import read_case
from volumes.data.preprocessing import (
    described_preprocessing,
    preprocessing,
    refuse_differences,
)
from volumes.data.subjects import (
    describe_overlap,
    find_overlap,
    is_complete,
    refuse_overlap,
)
from volumes.prepared.preparation import READERS

logger = logging.getLogger(__name__)
ACCEPT = "add --accept_overlap"
PREPARED = "Give `data` as in the model's training, or a model that was trained on volumes prepared like this"
# A model that was built in Python, or trained by other code than ours, has no record or a part of one.
UNKNOWN = "its record of training subjects is not complete, so whether it has seen the test subjects was not checked"


def check_models(
    config: DataConfig,
    splits: Sequence[str],
    models: Sequence[str | Path],
    *,
    others: Sequence[str | Path] = (),
    generated: Sequence[Path] = (),
    accepted: bool = False,
) -> None:
    """Check models before they are tested on the real volumes of some splits of `config`.

    Args:
        models: folders, LoRA files or repositories of the Hub. Both their training subjects and their preprocessing are
            checked.
        others: folders of models; only their training subjects are checked.
        generated: folders of generate.py. The training subjects of the models that generated the volumes are checked.
        accepted: whether equal names of subjects (not equal voxels) are other people; they are logged.
    Raises: ValueError naming the subjects, or the differences.
    """
    known: dict[str, TrainedOn] = {str(path): read_model(path) for path in (*models, *others)}
    for folder in generated:
        known[str(folder)] = TrainedOn(read_generated(folder), None)
    if not known:
        return
    test_cases = [case for case in load_cases(config) if case.split in splits]
    voxels, spacings = read_test_cases(test_cases, config)
    prepared = preprocessing(config, spacings or None)
    for path, model in known.items():
        if path not in map(str, others):
            refuse_differences(model.data, prepared, path, PREPARED)
        if path in map(str, models) and model.data is None:
            logger.warning("%s: does not record how its volumes were prepared", path)
        refuse_seen_cases(model.subjects, test_cases, config, voxels, path, accepted=accepted)


def refuse_seen_cases(
    records: Sequence[Mapping[str, Any]],
    test_cases: Sequence[Case],
    config: DataConfig,
    voxels: Mapping[str, Sequence[str]],
    model: str,
    *,
    accepted: bool = False,
) -> None:
    """Check the training records of a model; logs a warning where they are incomplete.

    Raises: ValueError if the model has seen test cases.
    """
    if not is_complete(records):
        logger.warning("%s: %s", model, UNKNOWN)
    overlap = find_overlap(records, test_cases, config, voxels)
    equal = [seen for seen in overlap if seen.kind == "voxels"]
    refuse_overlap(equal if accepted else overlap, model, ACCEPT)
    if overlap:
        logger.warning("accepted: %s", describe_overlap(overlap, model))


def check_pipeline(
    pipe: Any, config: DataConfig, test_cases: Sequence[Case], model: str, *, accepted: bool = False
) -> None:
    """Check a loaded pipeline with its LoRAs, as `check_models`."""
    records = pipe.training_subjects
    voxels, spacings = read_test_cases(test_cases, config)
    recorded = {**(pipe.vae.config["data"] or {}), **described_preprocessing(pipe.data)}
    refuse_differences(recorded, preprocessing(config, spacings or None), model, PREPARED)
    refuse_seen_cases(records, test_cases, config, voxels, model, accepted=accepted)


def read_test_cases(
    cases: Sequence[Case], config: DataConfig
) -> tuple[dict[str, tuple[str, ...]], list[tuple[float, float, float]]]:
    """Read the digests of each case's voxels by name, and the stored spacings in mm.

    Cases that cannot be read are ignored: the command that reads them later names or skips them.
    """
    digests, spacings = {}, []
    with ThreadPoolExecutor(READERS) as readers:
        jobs = readers.map(lambda case: _read(case, config), cases)
        progress = tqdm(jobs, total=len(cases), desc="checking held-out volumes", delay=2, leave=False, disable=None)
        try:
            for case, voxels in zip(cases, progress, strict=True):
                if voxels is not None:
                    digests[case.name], spacing = voxels
                    spacings.append(spacing)
        except BaseException:  # Ctrl-C: cases that were not begun are not read
            readers.shutdown(cancel_futures=True)
            raise
    return digests, spacings


Voxels = tuple[tuple[str, ...], tuple[float, float, float]]


def _read(case: Case, config: DataConfig) -> Voxels | None:
    try:
        key = (case.name, case.phantom, repr(config), *_stamps(case.images.values()))
        if key not in _READ:
            stored = read_case(case, config, masks=False)
            grid = stored.images[config.resample_to or next(iter(stored.images))]
            _READ[key] = stored.digests(config), grid.spacing
    except (VolumeError, OSError):
        return None
    return _READ[key]


# By file, size and time: `evaluate.py all` reads the same cases for each of its parts.
_READ: dict[tuple[object, ...], Voxels] = {}


def _stamps(paths: Iterable[Path]) -> Iterable[tuple[str, int, int]]:
    for path in paths:
        for part in volume_parts(path) if path.exists() else []:
            stat = part.stat()
            yield str(part), stat.st_size, stat.st_mtime_ns
