"""Whether a model has seen what is to judge it, and whether it learned from volumes that were prepared as these are."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.doctor.cases import (
    Finding,
    fail,
    ok,
    warn,
)
from pipelines.storage.trained_on import TrainedOn, read_generated, read_model
from volumes import Case, DataConfig, VolumeError, load_cases, volume_parts
from volumes.data.dataset import READERS, read_image
from volumes.data.preprocessing import (
    described_preprocessing,
    differences,
    preprocessing,
    refuse_differences,
)
from volumes.data.subjects import (
    REMEDY,
    describe_overlap,
    find_overlap,
    is_complete,
    refuse_overlap,
    voxel_digests,
)

logger = logging.getLogger(__name__)
ACCEPT = "add --accept_overlap"
PREPARED = "Give `data` as the model learned it, or a model that was trained on volumes prepared like this"
UNKNOWN = "has no whole record of its training subjects (it is older), so whether it has seen those that judge it was not checked"


def check_models(
    config: DataConfig,
    splits: Sequence[str],
    models: Sequence[str | Path],
    *,
    others: Sequence[str | Path] = (),
    generated: Sequence[Path] = (),
    accepted: bool = False,
) -> None:
    """Check models before they are judged on the real volumes of some splits of `config`.

    Args:
        models: folders, LoRA files or repositories of the Hub, checked for what they have seen and for how their volumes were
            prepared.
        others: folders of models that are checked for what they have seen alone.
        generated: folders of volumes that generate.py made, checked for what the models that made them have seen.
        accepted: whether subjects that are known by names alone are other people; they are logged.
    Raises: ValueError naming the subjects, or what differs.
    """
    known: dict[str, TrainedOn] = {str(path): read_model(path) for path in (*models, *others)}
    for folder in generated:
        known[str(folder)] = TrainedOn(read_generated(folder), None)
    if not known:
        return
    judged = [case for case in load_cases(config) if case.split in splits]
    voxels, spacings = read_judged(judged, config)
    given = preprocessing(config, spacings or None)
    for path, model in known.items():
        if path not in map(str, others):
            refuse_differences(model.data, given, path, PREPARED)
        if path in map(str, models) and model.data is None:
            logger.warning("%s: does not say how its volumes were prepared (it is older)", path)
        refuse_seen_cases(model.subjects, judged, config, voxels, path, accepted=accepted)


def refuse_seen_cases(
    records: Sequence[Mapping[str, Any]],
    judged: Sequence[Case],
    config: DataConfig,
    voxels: Mapping[str, Sequence[str]],
    model: str,
    *,
    accepted: bool = False,
) -> None:
    """Raises: ValueError if the model with these records has seen cases that judge it; a warning where that is not known."""
    if not is_complete(records):
        logger.warning("%s: %s", model, UNKNOWN)
    found = find_overlap(records, judged, config, voxels)
    equal = [one for one in found if one.kind == "voxels"]
    refuse_overlap(equal if accepted else found, model, ACCEPT)
    if found:
        logger.warning("accepted: %s", describe_overlap(found, model))


def check_pipeline(
    pipe: Any, config: DataConfig, judged: Sequence[Case], model: str, *, accepted: bool = False
) -> None:
    """As `check_models`, of a pipeline that is loaded, with its LoRAs."""
    records = pipe.training_subjects
    voxels, spacings = read_judged(judged, config)
    learned = {**(pipe.vae.config["data"] or {}), **described_preprocessing(pipe.data)}
    refuse_differences(learned, preprocessing(config, spacings or None), model, PREPARED)
    refuse_seen_cases(records, judged, config, voxels, model, accepted=accepted)


def overlap_findings(
    path: str | Path,
    cases: Sequence[Case],
    config: DataConfig,
    voxels: Mapping[str, Sequence[str]],
    spacings: Sequence[Sequence[float]] | None = None,
) -> list[Finding]:
    """What doctor says of a model that is used with this data."""
    try:
        model = read_model(path)
    except ValueError as error:
        return [fail("model", str(error), "correct the path")]
    findings = []
    if found := find_overlap(model.subjects, cases, config, voxels):
        listed = sorted({one.case.name for one in found})
        findings.append(fail("subjects", describe_overlap(found, str(path)), REMEDY, listed))
    elif is_complete(model.subjects):
        findings.append(ok("subjects", f"{path} has seen no subject that is held out here"))
    else:
        findings.append(warn("subjects", f"{path}: {UNKNOWN}", "train it again, or add the record by tools/record.py"))
    if model.data is None:
        message = f"{path} does not say how its volumes were prepared (it is older)"
        findings.append(
            warn("preprocessing", message, "see that intensity and spacing of `data` are those of its training")
        )
    elif differ := differences(model.data, preprocessing(config, spacings)):
        findings.append(fail("preprocessing", f"{path}: {'; '.join(differ)}", PREPARED))
    else:
        findings.append(ok("preprocessing", f"{path} learned from volumes prepared as these are"))
    return findings


def read_judged(
    cases: Sequence[Case], config: DataConfig
) -> tuple[dict[str, tuple[str, ...]], list[tuple[float, float, float]]]:
    """Digests of the voxels of each case by name, and mm between voxels as stored. Cases that cannot be read are left out: the
    command that reads them names them, or skips them."""
    digests, spacings = {}, []
    with ThreadPoolExecutor(READERS) as readers:
        jobs = readers.map(lambda case: _read(case, config), cases)
        progress = tqdm(jobs, total=len(cases), desc="checking held-out volumes", delay=2, leave=False, disable=None)
        try:
            for case, found in zip(cases, progress, strict=True):
                if found is not None:
                    digests[case.name] = found[0]
                    spacings.append(found[1])
        except BaseException:  # Ctrl-C: what was not begun is not read
            readers.shutdown(cancel_futures=True)
            raise
    return digests, spacings


Found = tuple[tuple[str, ...], tuple[float, float, float]]


def _read(case: Case, config: DataConfig) -> Found | None:
    try:
        key = (case.name, case.phantom, repr(config), *_stamps(case.images.values()))
        if key not in _READ:
            image = read_image(case, config)
            _READ[key] = voxel_digests(image.array, apart=not config.image_labels), image.spacing
    except (VolumeError, OSError):
        return None
    return _READ[key]


_READ: dict[tuple[Any, ...], Found] = {}  # by file, size and time: `evaluate.py all` asks for each of its parts


def _stamps(paths: Iterable[Path]) -> Iterable[tuple[str, int, int]]:
    for path in paths:
        for part in volume_parts(path) if path.exists() else []:
            found = part.stat()
            yield str(part), found.st_size, found.st_mtime_ns
