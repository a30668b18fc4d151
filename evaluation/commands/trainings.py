"""Progress of commands that train."""

import time
from collections.abc import Callable

from accelerate import PartialState

from cli.live_bar import LiveBar


def progress_disabled() -> bool | None:
    """What a progress bar's `disable` should be: one bar on a terminal, the main process's."""
    return None if PartialState().is_main_process else True


class StepClock:
    """Says after the first steps how long all of them will take."""

    def __init__(self, steps: int):
        self.steps, self.start, self.told = steps, 0.0, False

    def watch(self, progress: LiveBar) -> Callable[[int, float], None]:
        """A callback for each training step: (step counted from 1, loss)."""

        def on_step(step: int, loss: float) -> None:
            progress.update()
            progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if step == 1:  # the first step prepares kernels, so the clock starts after it
                self.start = time.perf_counter()
            elif step == 4 and not self.told:
                seconds = (time.perf_counter() - self.start) / 3
                progress.write(
                    f"a training step takes {seconds:.2f} s: about {seconds * self.steps / 60:.0f} minutes for {self.steps} steps"
                )
                self.told = True

        return on_step
