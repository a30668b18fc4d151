"""What goes wrong in a run and can be seen in its losses."""

from collections import deque
from statistics import median

REPORTS, FEWEST, FACTOR = 20, 5, 4.0


class SpikeWatch:
    """Compares every reported loss with the median of those before it."""

    def __init__(self) -> None:
        self.before: deque[float] = deque(maxlen=REPORTS)

    def __call__(self, loss: float) -> str | None:
        """What is to be said of a loss that rose to more than four times that median, if it did; five reports come first."""
        usual = median(self.before) if len(self.before) >= FEWEST else 0.0
        self.before.append(loss)
        if not 0 < FACTOR * usual < loss:  # a loss with an adversary's part may be below 0: no ratio then
            return None
        return (
            f"the loss rose to {loss:.4g}, {loss / usual:.1f} times the median of the last {len(self.before) - 1} reports "
            f"({usual:.4g}). If it stays there, go on from a checkpoint before it (--resume FOLDER) with a lower "
            "optimizer.learning_rate or optimizer.max_grad_norm, and --accept_changes true"
        )
