"""Broken label maps: a label that is missing, in pieces, or cut off at the edge as in no map of the training set."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.rejection import Check, Verdict
from volumes import label_map_fault
from volumes.map_checks import LabelMapStats


def map_check(known: LabelMapStats, names: Mapping[int, str]) -> Check:
    """Build the check of generated label maps, of labels with these names, against the training maps:
    `volumes.label_map_fault`.
    """

    def judge(image: Any, in_box: bool = False) -> Verdict:
        voxel = float(np.prod(image.header.get_zooms()[:3]))
        fault = label_map_fault(np.asarray(image.dataobj), voxel, names, known)
        return fault is not None, {} if fault is None else {"fault": fault}

    return Check("map_check", judge, lambda findings: f"is unlike every map of the training set ({findings['fault']})")
