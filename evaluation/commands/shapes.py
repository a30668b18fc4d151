"""`evaluate.py shapes`: whether generated label maps are shaped as real ones."""

import dataclasses
import time
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation.metrics.label_shapes import compare_shapes
from evaluation.report import provenance, write_report

from .sets import describe_sets, load_sets

NAME = "shapes"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Compare the sets. Raises: ValueError for data whose images are no label maps."""
    start = time.perf_counter()
    sets, skipped = load_sets(options, NAME)
    report = {
        "evaluation": NAME,
        "shapes": compare_shapes(sets, options.data.channels, options.seed),
        "volumes": describe_sets(sets, options.unseen),
        "skipped": skipped,
        "synthetic": options.synthetic,
        "seconds": round(time.perf_counter() - start, 2),
        "data": dataclasses.asdict(options.data),
        **provenance(),
    }
    write_report(options.output, report)
    found = report["shapes"]
    for name, one in [*found["figures"].items(), ("all together, kernel distance", {"wasserstein": found["kernel"]})]:
        made, floor = (one["wasserstein"][key] for key in ("generated_to_test", "training_to_test"))
        excess = one["wasserstein"]["excess"]["interval"]
        verdict = "outside" if excess[0] > 0 else "within"
        print(f"{name}: {made['mean']:.3f}; real against real {floor['mean']:.3f}: {verdict}")
    auc, (low, high) = (found["closer_to_training"][key] for key in ("auc", "interval"))
    print(f"nearer to training maps than unseen real ones, AUC: {auc:.3f} ({low:.3f} to {high:.3f})")
    print(f"report: {options.output}")
    return report
