"""Check a model against the data: subjects that it has seen, and differences in how volumes were prepared."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.data.seen import PREPARED, UNKNOWN
from pipelines.storage.trained_on import read_model
from volumes import Case, DataConfig
from volumes.data.preprocessing import differences, preprocessing
from volumes.data.subjects import REMEDY, describe_overlap, find_overlap, is_complete

from .cases import Finding, fail, ok, warn


def overlap_findings(
    path: str | Path,
    cases: Sequence[Case],
    config: DataConfig,
    voxels: Mapping[str, Sequence[str]],
    spacings: Sequence[Sequence[float]] | None = None,
) -> list[Finding]:
    """Report on a model that is used with this data."""
    try:
        model = read_model(path)
    except ValueError as error:
        return [fail("model", str(error), "correct the path")]
    findings = []
    if overlap := find_overlap(model.subjects, cases, config, voxels):
        listed = sorted({seen.case.name for seen in overlap})
        findings.append(fail("subjects", describe_overlap(overlap, str(path)), REMEDY, listed))
    elif is_complete(model.subjects):
        findings.append(ok("subjects", f"{path} has seen none of the held-out subjects"))
    else:
        findings.append(warn("subjects", f"{path}: {UNKNOWN}", "train it with train_vae.py and train_ldm.py"))
    if model.data is None:
        message = f"{path} does not record how its volumes were prepared"
        findings.append(
            warn("preprocessing", message, "check that intensity and spacing of `data` are those of its training")
        )
    elif differ := differences(model.data, preprocessing(config, spacings)):
        findings.append(fail("preprocessing", f"{path}: {'; '.join(differ)}", PREPARED))
    else:
        findings.append(ok("preprocessing", f"{path} was trained on volumes prepared like these"))
    return findings
