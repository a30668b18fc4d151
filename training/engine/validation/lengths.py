"""Which length of average a run leaves, where `loop.export` is posthoc."""

import logging
import math

from cli.command import CannotContinue
from training.engine.averages.snapshots import Snapshots

from .measurements import Measurements

logger = logging.getLogger("training")


def choose_length(measurements: Measurements, snapshots: Snapshots) -> tuple[dict[str, float], dict[str, float]]:
    """Load the average of the length whose metric (`loop.best_by`) is best on the held-out items into the learner's
    average, which is then what the run leaves. All lengths see the same noise. Returns each length's metric, and
    all metrics of the average that is left.

    Raises: CannotContinue if snapshots are missing, if a signal ended it, and if no metric was finite.
    """
    options, best, state = measurements.options, measurements.best, measurements.state
    average, metric = measurements.step.learners[0].average, best.metric
    found: dict[float, float] = {}
    measured: dict[float, dict[str, float]] = {}
    by_samples = metric not in measurements.step.metrics
    snapshots.check_complete(state.snapshots)
    snapshots.take(state.step)  # a run that ended early has none of its last step
    for length in options.ema_lengths:
        average.load_state_dict({**average.state_dict(), **snapshots.average_of(length)})
        measured[length] = measurements.sample(log=False) if by_samples else measurements.validate(log=False)
        if not measured[length]:
            raise CannotContinue("loop.export posthoc: was interrupted; --resume latest compares the lengths again")
        best.check_measured(measured[length])
        found[length] = measured[length][metric]
        logger.info("average of length %g: %s %.4g", length, metric, found[length])
    finite = {length: value for length, value in found.items() if math.isfinite(value)}
    if not finite:
        raise CannotContinue(f"loop.export posthoc: {metric} is not finite at any length; use --loop.export last")
    chosen = (max if best.more_is_better else min)(finite, key=lambda length: finite[length])
    average.load_state_dict({**average.state_dict(), **snapshots.average_of(chosen)})
    logger.info("the run leaves the average of length %g", chosen)
    others = measurements.validate(log=False) if by_samples else {}
    if options.sample_every and not by_samples:
        others = measurements.sample(log=False)
    lengths = {f"{length:g}": value for length, value in found.items()} | {"chosen": chosen}
    return lengths, {**measured[chosen], **others}
