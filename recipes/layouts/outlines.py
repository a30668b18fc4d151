"""DICOM-SEG and RTSTRUCT beside series: which series they were drawn on, and what their segments are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydicom

from files.names import nfc
from volumes.formats.segments import sequence, text

TAGS = [
    "SeriesDescription", "SegmentSequence", "ReferencedSeriesSequence", "StructureSetROISequence",
    "ReferencedFrameOfReferenceSequence",
]  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """A DICOM-SEG or RTSTRUCT.

    Attributes:
        path: its folder if it lies there alone, else the file; relative to the root.
        kind: SEG or RTSTRUCT.
        description: of its series.
        drawn_on: SeriesInstanceUIDs of the images; empty if it names none.
        segments: names; `ROI 3` or `segment 3` for one without a name.
    """

    path: str
    kind: str
    description: str
    drawn_on: tuple[str, ...]
    segments: tuple[str, ...]


def read_outline(path: str, file: Path, kind: str) -> Outline | str:
    """Read the header of a DICOM-SEG or RTSTRUCT; return why, if it cannot be read.

    Args:
        path: how a recipe names the object.
        file: of the object.
        kind: SEG or RTSTRUCT.
    """
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
        series = sequence(header, "ReferencedSeriesSequence")
        for frame in sequence(header, "ReferencedFrameOfReferenceSequence"):
            for study in sequence(frame, "RTReferencedStudySequence"):
                series += sequence(study, "RTReferencedSeriesSequence")
        if kind == "SEG":
            numbered = {int(one.SegmentNumber): one for one in sequence(header, "SegmentSequence")}
            names = [text(one, "SegmentLabel") or f"segment {n}" for n, one in numbered.items() if n]
        else:
            rois = sequence(header, "StructureSetROISequence")
            names = [text(one, "ROIName") or f"ROI {int(one.ROINumber)}" for one in rois]
    except Exception as error:  # of many kinds, as in `volumes.formats.dicom`
        return f"{kind} that cannot be read ({path}: {type(error).__name__}: {error})"
    if not names:
        return f"{kind} without segments"
    drawn_on = tuple(uid for one in series if (uid := text(one, "SeriesInstanceUID")))
    return Outline(path, kind, nfc(text(header, "SeriesDescription")), drawn_on, tuple(nfc(name) for name in names))
