"""Waiting for other processes."""

import time


def when(there, processes, seconds=180):
    """Wait until `there()`."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline and all(one.exitcode is None for one in processes)
        time.sleep(0.05)
