"""Prepare the cases of a data set that are not prepared yet, in threads, beside other processes that do the same."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tqdm import tqdm

from files.cache import LIMIT, cache_limit, cache_root, contents, pinned_bytes
from volumes.data.case_files import first_file, known_labels
from volumes.data.cases import Case
from volumes.data.config import DataConfig
from volumes.data.table_conditions import read_classes, read_numbers
from volumes.formats.raw import memory_bytes
from volumes.volume import VolumeError

from .case import CaseFacts, prepare_unscaled
from .entry import Arrays, DamagedEntry, facts_of, pack
from .keys import case_key, content_stamps, settings_key
from .memory import MemoryShare, preparing_bytes, processes_here
from .store import PreparedStore

logger = logging.getLogger(__name__)
READERS = 4  # threads: decompression runs outside the interpreter's lock
HELD = 0.5  # of the memory of this process: volumes that cannot be stored are kept in it


@dataclass(frozen=True, eq=False)
class Ready:
    """A prepared case: its key in the store, what is known of it, and its voxels if they could not be stored and memory
    has room for them."""

    key: str
    facts: CaseFacts
    held: Arrays | None = None


class Preparation:
    """Prepares cases as a config says, and stores them.

    Args:
        processes: how many of those that `torchrun` would count as one do the same on this machine: they divide the
            memory.
        quiet: whether to show no progress.
    """

    def __init__(self, config: DataConfig, store: PreparedStore, *, processes: int = 1, quiet: bool = False) -> None:
        self.config, self.store, self.settings = config, store, settings_key(config)
        self._memory, self._stopped = MemoryShare(processes * processes_here()), threading.Event()
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self._room, self._guard = HELD * memory_bytes(), threading.Lock()
        self._full = False  # whether a volume could not be stored, which a message said

    def run(self, cases: Sequence[Case]) -> list[Ready | VolumeError]:
        """Prepare all cases. Returns each with its facts, or with the reason why it is refused.

        Raises: VolumeError for the first case that is refused, unless `on_error` is "skip".
        """
        cache_limit(cache_root(), 0)  # a wrong limit is refused before the work
        self.store.clean()
        outcomes = self._pass(cases, self._facts)
        ready = [one for one in outcomes if isinstance(one, Ready)]
        self.store.wanted.update((one.key, one.facts.nbytes) for one in ready)
        missing = [one for one in ready if one.held is None and not self.store.has_voxels(one.key, one.facts)]
        if self._full or self.store.generated or self.store.has_all():
            return outcomes
        used, removable = contents(cache_root())
        wanted, pinned = self.store.wanted_of_process(), pinned_bytes(removable)
        needed, limit = sum(wanted.values()), cache_limit(cache_root(), used)
        enough = needed + pinned <= limit
        if enough and not missing:
            return outcomes
        if enough:
            keys = {one.key for one in missing}
            lost = [isinstance(one, Ready) and one.key in keys for one in outcomes]
            again = iter(self._pass([c for c, is_lost in zip(cases, lost, strict=True) if is_lost], self._voxels))
            return [next(again) if is_lost else one for one, is_lost in zip(outcomes, lost, strict=True)]
        copies = f", and the copies of remote files that running jobs use {pinned / 2**30:.3g} GiB" if pinned else ""
        logger.warning(
            "the %d volumes take %.3g GiB%s, more than the %.3g GiB that the cache may hold: some are prepared again "
            "when they are read, which takes time. Raise $%s, or set MEDVOLUME_CACHE to a larger disk",
            *(len(wanted), needed / 2**30, copies, limit / 2**30, LIMIT),
        )
        return outcomes

    def again(self, case: Case, key: str, facts: CaseFacts) -> Arrays:
        """Prepare a case whose voxels are no longer stored, and store them.

        Raises: VolumeError if its files are gone, or hold something else now.
        """
        if self._key(case) != key:
            raise VolumeError(f"{first_file(case)}: has changed since this process began; start again")
        return self._prepare(case, key, facts.checksum)[1]

    def _pass(self, cases: Sequence[Case], work: Callable[[Case, bool], Ready | None]) -> list[Ready | VolumeError]:
        """Do some work on each case: first on those that no other process works on, then on the others."""
        outcomes: dict[int, Ready | VolumeError] = {}
        for wait in (False, True):
            todo = [index for index in range(len(cases)) if index not in outcomes]
            with ThreadPoolExecutor(READERS) as readers:
                jobs = [readers.submit(work, cases[index], wait) for index in todo]
                quiet = True if self.quiet else None
                shown = tqdm(jobs, desc="preparing volumes", unit="volume", delay=2, leave=False, disable=quiet)
                try:
                    for index, job in zip(todo, shown, strict=True):
                        try:
                            if (outcome := job.result()) is not None:
                                outcomes[index] = outcome
                        except VolumeError as error:
                            if self.config.on_error == "raise":
                                raise
                            outcomes[index] = error
                except BaseException:  # Ctrl-C too: what was not begun is not read, and nothing is waited for
                    self._stopped.set()
                    readers.shutdown(cancel_futures=True)
                    raise
        return [outcomes[index] for index in range(len(cases))]

    def _facts(self, case: Case, wait: bool) -> Ready | None:
        return self._ready(case, wait, lambda key, facts: True)

    def _voxels(self, case: Case, wait: bool) -> Ready | None:
        return self._ready(case, wait, self.store.has_voxels)

    def _ready(self, case: Case, wait: bool, suffices: Callable[[str, CaseFacts], bool]) -> Ready | None:
        """Prepare a case unless what is there `suffices`; None if another process does and this one shall not wait."""
        classes = tuple(read_classes(case, self.config))
        key = self._key(case)
        found, held = self.store.find(key, case), None
        if found is None or not suffices(key, found):
            with self.store.claim(key, wait=wait, stopped=self._stopped) as mine:
                if not mine:
                    return None
                found = self.store.find(key, case)  # another process may have just prepared it
                if found is None or not suffices(key, found):
                    found, arrays, stored = self._prepare(case, key)
                    held = None if stored else self._kept(arrays, found.nbytes)
        numbers = tuple(read_numbers(case, self.config.numbers, found.grid)) if self.config.numbers else ()
        return Ready(key, replace(found, classes=classes, numbers=numbers), held)

    def _kept(self, arrays: Arrays, nbytes: int) -> Arrays | None:
        """Return arrays that are not stored, or None where all of them together would take too much memory."""
        with self._guard:
            self._full = True
            if nbytes > self._room:
                return None
            self._room -= nbytes
            return arrays

    def _key(self, case: Case) -> str:
        try:
            return case_key(case, self.settings)
        except (OSError, VolumeError) as error:
            prepare_unscaled(case, self.config)  # it says best what is wrong with a file
            raise VolumeError(f"{first_file(case)}: cannot be read: {error}") from error

    def _prepare(self, case: Case, key: str, expected: int | None = None) -> tuple[CaseFacts, Arrays, bool]:
        """Prepare and store a case, whose voxels have the checksum `expected`. Returns its facts, its voxels, and
        whether these are stored."""
        before = content_stamps(case)
        with self._memory.take(preparing_bytes(case, self.config), self._stopped):
            unscaled = prepare_unscaled(case, self.config)
            arrays = pack(unscaled)
            facts = facts_of(unscaled, arrays, self.config, len(known_labels(self.config)))
            del unscaled
        if content_stamps(case) != before or case_key(case, self.settings) != key:
            raise VolumeError(f"{first_file(case)}: changed while it was read; start again when nobody writes to it")
        if expected not in (None, facts.checksum):
            raise VolumeError(f"{first_file(case)}: gives other voxels than before; start again")
        return facts, arrays, self.store.put(key, case, facts, arrays)


def prepare_cases(
    cases: Sequence[Case], config: DataConfig, *, processes: int = 1, verify: bool = False
) -> list[Ready | VolumeError]:
    """Prepare all cases, for trainings that come later.

    Args:
        processes: how many share the work. If one of them dies, the others do its part.
        verify: whether to compare the voxels of volumes that are there already with their checksums; damaged ones are
            prepared again.
    Returns: each case, or the reason why it is refused. Raises: as `Preparation.run`.
    """
    store = PreparedStore()
    spawned = multiprocessing.get_context("spawn")
    helpers = [
        spawned.Process(target=_help, args=(cases, config, processes), daemon=True) for _ in range(processes - 1)
    ]
    for helper in helpers:
        helper.start()
    try:
        preparation = Preparation(config, store, processes=processes)
        outcomes = preparation.run(cases)
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()
    for case, one in zip(cases, outcomes, strict=True):
        if verify and isinstance(one, Ready) and one.held is None:
            try:
                store.read(one.key, one.facts)
            except FileNotFoundError:  # removed, for the cache is full
                continue
            except DamagedEntry as error:
                logger.warning("%s: damaged (%s); prepared again", store.voxels(one.key), error)
                preparation.again(case, one.key, one.facts)
    return outcomes


def _help(cases: Sequence[Case], config: DataConfig, processes: int) -> None:
    """Prepare cases in a process of its own. The first process reports what is refused, because it meets it too."""
    logging.disable(logging.WARNING)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a terminated process leaves behind
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        Preparation(config, PreparedStore(), processes=processes, quiet=True).run(cases)
