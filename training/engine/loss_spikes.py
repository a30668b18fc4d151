"""What goes wrong in a run and can be seen in its losses."""

from collections import deque
from collections.abc import Mapping
from statistics import mean, median

REPORTS, MIN_COUNT, FACTOR = 20, 5, 4.0


class SpikeWatch:
    """Compares every reported loss with the median of those before it."""

    def __init__(self) -> None:
        self.before: deque[float] = deque(maxlen=REPORTS)

    def __call__(self, loss: float) -> str | None:
        """What is to be said of a loss that rose to more than four times that median, if it did; five reports come first."""
        usual = median(self.before) if len(self.before) >= MIN_COUNT else 0.0
        self.before.append(loss)
        if not 0 < FACTOR * usual < loss:  # a loss with an adversary's part may be below 0: no ratio then
            return None
        return (
            f"the loss rose to {loss:.4g}, {loss / usual:.1f} times the median of the last {len(self.before) - 1} reports "
            f"({usual:.4g}). If it stays there, go on from a checkpoint before it (--resume FOLDER) with a lower "
            "optimizer.learning_rate or optimizer.max_grad_norm, and --accept_changes true"
        )


CONSTANT = 1e-6  # spread of all reported losses, as a share of them, below which the loss did not move
MIN_TREND_REPORTS, ROSE = 20, 1.5  # reports, and how much higher the last quarter of them is than the first


class StandstillWatch:
    """Whether a run has learned anything: its weights moved, and so did its loss, not upwards."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def note(self, loss: float) -> None:
        """Remember a reported loss."""
        self.losses.append(loss)

    def verdict(self, steps: int, moved: Mapping[str, tuple[bool, bool]], adversarial: bool) -> list[str]:
        """What is to be said at the end of a run; nothing of one that went well.

        Args:
            steps: that were taken.
            moved: of each network, whether any trained weight moved, and any of the average.
            adversarial: whether a discriminator's part of the loss may rise while all is well.
        """
        if not steps:
            return []
        faults = []
        for name, (weights, average) in moved.items():
            if not weights:
                faults.append(
                    f"no weight of {name} moved in {steps} steps: nothing was learned, and what is saved is the start. Raise "
                    "optimizer.learning_rate or optimizer.max_grad_norm, and see that some weight in `losses` is not 0"
                )
            elif not average:
                faults.append(
                    f"the averaged weights of {name}, which are saved, did not move in {steps} steps: lower loop.ema_decay"
                )
        losses, quarter = self.losses, len(self.losses) // 4
        if faults or not quarter:
            return faults
        if max(losses) - min(losses) <= CONSTANT * max(map(abs, losses)):
            return [
                f"the loss was {losses[-1]:.4g} in all {len(losses)} reports: nothing was learned. Look at the volumes (python "
                "-m evaluation.doctor) and at the weights in `losses`"
            ]
        first, last = losses[:quarter], losses[-quarter:]
        risen = min(last) > max(first) and mean(last) > ROSE * mean(first) > 0
        if risen and len(losses) >= MIN_TREND_REPORTS and not adversarial:
            return [
                f"the loss rose from {mean(first):.4g} in the first quarter of the run to {mean(last):.4g} in the last: it "
                "diverges. Lower optimizer.learning_rate, and begin again"
            ]
        return []
