"""A progress bar whose clock keeps running during long steps."""

import sys
import threading
import time
from datetime import timedelta
from typing import Any

from tqdm import tqdm

REFRESH = 2.0  # seconds after which a bar on a terminal is redrawn, so that its clock runs
QUIET = 60.0  # seconds without news before a line is written if there is no terminal


class LiveBar(tqdm):
    """Show tqdm's bar with a running clock; without a terminal, write a line for every minute that a step takes.

    Args (beside tqdm's):
        disable: None draws the bar on a terminal, and elsewhere writes those lines; True does neither.
    """

    def __init__(self, *args: Any, disable: bool | None = None, **options: Any):
        self._ended = threading.Event()
        self.done, self.news, self.began, self.doing = options.get("initial", 0), 0.0, 0.0, ""
        super().__init__(*args, disable=disable, **options)
        self.name, self.whole = options.get("desc") or "", self.total
        self.lines = disable is None and self.disable
        self.now()
        if not self.disable or self.lines:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def now(self, doing: str = "") -> None:
        """Note the start of a step, or of other work such as "validation"."""
        self.doing, self.began = doing, time.monotonic()
        self.news = self.began
        if not self.disable and self.desc != (described := ", ".join(part for part in (self.name, doing) if part)):
            self.set_description_str(described)

    def update(self, n: float | None = 1) -> bool | None:
        """Note that `n` steps are done."""
        self.done += n or 0
        self.now()
        return super().update(n)

    def close(self) -> None:
        """Stop the clock and leave the bar as it is."""
        self._ended.set()
        super().close()

    def __iter__(self):
        if not self.lines:
            yield from super().__iter__()
            return
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def line(self) -> str:
        """Return the text of a line: "volumes: 3 of 10 done; the next one takes 0:02:00 so far"."""
        of = f" of {self.whole:g}" if self.whole else ""
        took = timedelta(seconds=round(time.monotonic() - self.began))
        doing = self.doing or "the next one"
        return f"{self.name + ': ' if self.name else ''}{self.done:g}{of} done; {doing} takes {took} so far"

    def _beat(self) -> None:
        while not self._ended.wait(QUIET / 10 if self.lines else REFRESH):
            if self.lines and time.monotonic() - self.news >= QUIET:
                self.news = time.monotonic()
                print(self.line(), file=sys.stderr, flush=True)
            elif not self.disable and time.monotonic() - self.began >= REFRESH:
                self.refresh()
