"""Warnings about a run that its losses show: spikes, and losses that do not fall."""

from collections import deque
from collections.abc import Mapping
from statistics import mean, median

REPORTS = 20  # reported losses that a new one is compared with
MIN_REPORTS = 5
SPIKE = 4.0  # times the median


class SpikeWatch:
    """Compare every reported loss with the median of recent ones."""

    def __init__(self) -> None:
        self.before: deque[float] = deque(maxlen=REPORTS)

    def __call__(self, loss: float) -> str | None:
        """Return a warning if `loss` exceeds 4x the median of recent reports; None before five reports."""
        typical = median(self.before) if len(self.before) >= MIN_REPORTS else 0.0
        self.before.append(loss)
        if not 0 < SPIKE * typical < loss:  # an adversarial loss may be negative: no ratio then
            return None
        return (
            f"the loss rose to {loss:.4g}, {loss / typical:.1f} times the median of the last {len(self.before) - 1} "
            f"reports ({typical:.4g}). If it stays there, resume from an earlier checkpoint (--resume FOLDER) with a "
            "lower optimizer.learning_rate or optimizer.max_grad_norm, and --accept_changes true"
        )


CONSTANT = 1e-6  # relative spread of all reported losses below which the loss did not move
MIN_TREND_REPORTS = 20
ROSE = 1.5  # times the first quarter's mean loss, above which the last quarter's mean has risen


class StandstillWatch:
    """Watch whether a run learns anything: its weights move, and its loss moves, but not upwards."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def note(self, loss: float) -> None:
        """Remember a reported loss."""
        self.losses.append(loss)

    def verdict(self, steps: int, moved: Mapping[str, tuple[bool, bool]], adversarial: bool) -> list[str]:
        """Return warnings at the end of a run; none if it went well.

        Args:
            steps: number of steps that were taken.
            moved: by network, whether any trained weight moved, and any averaged one.
            adversarial: whether a discriminator is trained, whose loss may rise in a run that goes well.
        """
        if not steps:
            return []
        faults = []
        for name, (weights, average) in moved.items():
            if not weights:
                faults.append(
                    f"no weight of {name} moved in {steps} steps: nothing was learned, and the initial weights are "
                    "saved. Raise optimizer.learning_rate or optimizer.max_grad_norm, and check that some weight in "
                    "`losses` is not 0"
                )
            elif not average:
                faults.append(
                    f"the averaged weights of {name}, which are saved, did not move in {steps} steps: lower "
                    "loop.ema_decay"
                )
        losses, quarter = self.losses, len(self.losses) // 4
        if faults or not quarter:
            return faults
        if max(losses) - min(losses) <= CONSTANT * max(map(abs, losses)):
            return [
                f"the loss was {losses[-1]:.4g} in all {len(losses)} reports: nothing was learned. Check the volumes "
                "(python -m evaluation.doctor) and at the weights in `losses`"
            ]
        first, last = losses[:quarter], losses[-quarter:]
        risen = min(last) > max(first) and mean(last) > ROSE * mean(first) > 0
        if risen and len(losses) >= MIN_TREND_REPORTS and not adversarial:
            return [
                f"the loss rose from {mean(first):.4g} in the first quarter of the run to {mean(last):.4g} in the "
                "last: it diverges. Lower optimizer.learning_rate, and start again"
            ]
        return []
