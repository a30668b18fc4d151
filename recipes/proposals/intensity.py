"""Propose how a channel's intensities are scaled, by what they seem to be: HU, SUV, or units of no meaning."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.contents import Look
from recipes.layouts.layout import has_word
from volumes.intensity import IntensityScaling

CT, PET = re.compile(r"ct|cbct|hu", re.IGNORECASE), re.compile(r"pet|pt|suv|fdg|psma", re.IGNORECASE)
AIR = -300.0  # HU: what is darker is air or lung
SOFT, WIDE = (-200.0, 300.0), (-1000.0, 1000.0)  # HU: soft tissue; with lung (low) or much bone (high)
LUNG, BONE = (
    0.1,
    0.03,
)  # of the voxels, from which the window shows them; air around a limb blurs into a few lung-like ones
SUV_WINDOW, SUV_MOST = 10.0, 100.0
SUV_NEAR = (5.0, 15.0)  # median 99.9th percentile for which the usual window is right


@dataclass(frozen=True)
class Proposal:
    """A scaling, why it was chosen, and what is unsure of it ("" if nothing is)."""

    scaling: IntensityScaling
    what: str
    why: str
    unsure: str = ""


def propose_intensity(name: str, looks: Sequence[Look]) -> Proposal:
    """Propose the scaling of a channel.

    Args:
        name: of the channel, which may name its modality.
        looks: at some of its volumes.
    """
    low = float(np.median([look.low for look in looks]))
    quantiles = np.median([look.quantiles for look in looks], axis=0)
    p99, top = float(quantiles[4]), float(quantiles[5])
    is_ct = has_word(CT, name)
    if low <= -500 or (is_ct and low < -50):
        return _hounsfield(looks)
    if has_word(PET, name):
        return _uptake(name, low, p99, top)
    percentile = IntensityScaling("percentile", 0.5, 99.5)
    if is_ct:
        window = IntensityScaling("window", _rounded(float(quantiles[0]), math.floor), _rounded(p99, math.ceil))
        unsure = (
            f"{name}: is called CT, but its lowest value is {low:g}, so it is not in HU; its window is by its values"
        )
        return Proposal(window, "values", "0.5th to 99.5th percentile of the values, equal for all volumes", unsure)
    return Proposal(
        percentile, "no unit", "values without a unit, as in most MR: scaled for each volume by its percentiles"
    )


def _hounsfield(looks: Sequence[Look]) -> Proposal:
    lung, bone = (float(np.median([getattr(look, name) for look in looks])) for name in ("lung", "bone"))
    low = WIDE[0] if lung > LUNG else SOFT[0]
    high = WIDE[1] if bone > BONE else SOFT[1]
    shows = ["soft tissue", *(["lung"] if lung > LUNG else []), *(["bone"] if bone > BONE else [])]
    why = f"HU; the window shows {' and '.join(shows)}: {lung:.0%} of the voxels are like lung, {bone:.0%} like bone"
    return Proposal(IntensityScaling("window", low, high), "HU", why)


def _uptake(name: str, low: float, p99: float, top: float) -> Proposal:
    if low < -1 or p99 > SUV_MOST:
        unsure = f"{name}: is called PET, but its values (to {p99:.4g}) are not SUV, perhaps Bq/ml; convert them to SUV"
        return Proposal(IntensityScaling("percentile", 0.5, 99.5), "not SUV", "PET that is not in SUV", unsure)
    high = SUV_WINDOW if SUV_NEAR[0] <= top <= SUV_NEAR[1] else max(_rounded(top, math.ceil), 1.0)
    why = f"SUV; the 99.9th percentile is {top:.3g} (median of the volumes)"
    return Proposal(IntensityScaling("window", 0.0, high), "SUV", why)


def _rounded(value: float, way: type | object = round) -> float:
    """Round to one digit, up or down: 27.3 -> 30."""
    if value == 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(abs(value)))
    return float(way(value / unit)) * unit  # pyright: ignore[reportCallIssue]
