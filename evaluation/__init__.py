"""Metrics as pure functions, and the studies of utility that are built on them."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .data.pairs import (
        LoadedPairs,
        Pair,
        generated_pairs,
        label_values,
        learning_cases,
        load_pairs,
        test_cases,
        unit_range,
    )
    from .metrics.dice import dice_per_volume
    from .metrics.fidelity import mean_gradient, psnr
    from .metrics.spectrum import (
        BAND_EDGES,
        CROP,
        band_names,
        band_power,
        center_crop,
        hann_window,
        mean_band_power,
        ratio_db,
    )
    from .networks.defaults import SHAPE, SOURCES
    from .networks.segmenter import (
        ITERATIONS,
        make_segmenter,
        train_segmenter,
    )
    from .report import machine, provenance, write_report
    from .studies.reconstruction import codebook_report, evaluate_reconstruction, reconstruct
    from .studies.utility import (
        mask_adherence,
        protocol,
        ratios,
        score_training,
    )

__all__ = [
    "BAND_EDGES",
    "CROP",
    "ITERATIONS",
    "SHAPE",
    "SOURCES",
    "LoadedPairs",
    "Pair",
    "band_names",
    "band_power",
    "center_crop",
    "codebook_report",
    "dice_per_volume",
    "evaluate_reconstruction",
    "generated_pairs",
    "hann_window",
    "label_values",
    "learning_cases",
    "load_pairs",
    "machine",
    "make_segmenter",
    "mask_adherence",
    "mean_band_power",
    "mean_gradient",
    "protocol",
    "provenance",
    "psnr",
    "ratio_db",
    "ratios",
    "reconstruct",
    "score_training",
    "test_cases",
    "train_segmenter",
    "unit_range",
    "write_report",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
