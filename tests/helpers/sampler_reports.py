"""Reports of evaluation.studies.samplers with planted figures."""

import json
from pathlib import Path
from typing import Any

GOOD = ((0.2, 0.1, 0.4), (0.5, 0.2, 1.0), (-0.01, -0.02, 0.01))  # kernel, spectrum and Dice: mean, low, high


def entry_of(
    scheduler: str,
    evaluations: float,
    kernel,
    spectrum,
    dice,
    *,
    steps: int = 10,
    guidance: float = 1.0,
    scheduler_class: str = "X",
) -> Any:
    """An entry of a report, from the mean, low and high of each figure."""

    def sets(value) -> Any:
        estimate = {"mean": value[0], "interval": list(value[1:])}
        return {"generated_to_test": estimate, "training_to_test": estimate}

    return {
        "scheduler": scheduler,
        "scheduler_class": scheduler_class,
        "steps": steps,
        "guidance": guidance,
        "evaluations_per_volume": evaluations,
        "seconds_per_volume": {"median": 1.0},
        "kernel": {"random": sets(kernel), "encoder": sets(kernel)},
        "spectrum": {"difference_db": sets(spectrum)},
        "dice": {"real": 0.9, "difference": {"of_means": dice[0], "interval_subjects": list(dice[1:])}},
        "intensity_bias": {"of_means": 0.0, "interval_subjects": [0.0, 0.0]},
    }


def write_choice(path: Path, entries: list[Any], **settings: str) -> Path:
    """Write a report on validation volumes."""
    report = {"evaluation": "samplers", "settings": {"split": "validation", **settings}, "combinations": entries}
    path.write_text(json.dumps(report))
    return path
