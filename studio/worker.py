"""The thread that has the model: it loads the one that a job needs, and generates one volume after the other.

A volume is planned and prepared as `medvolume generate` does, from the same seed, so that it has the same voxels.
"""

import itertools
import logging
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cli.command import users_message
from pipelines.base import VolumePipeline
from pipelines.call import StepEnd
from pipelines.checks.label_map import map_check
from pipelines.inputs.request import VolumeRequest
from pipelines.pipeline import MedVolumePipeline
from pipelines.planning import PlannedVolume, check_memory, plan_volumes, prepared_volumes, volume_seed
from pipelines.rejection import Attempt, Rejection
from pipelines.sampling import SamplingConfig
from pipelines.storage.provenance import channel_files, write_synthetic
from pipelines.storage.record import GenerationRecord

from .models import StudioModel

logger = logging.getLogger(__name__)

QUEUED, RUNNING, DONE, FAILED, CANCELED = "queued", "running", "done", "failed", "canceled"
MOST_WAITING = 8  # requests of one session

_listening = threading.Lock()  # Python has one list of warnings for all threads


class Canceled(Exception):
    """The user canceled the volume."""


@dataclass(eq=False)
class Job:
    """One volume to generate, or another piece of work for the thread of the model.

    Attributes:
        owner: id of the session.
        model: name of the pipeline that it needs.
        work: is called with the pipeline and this job; what it returns is `result`.
        loading: whether its model is being loaded, while it runs.
        step, steps: of the denoising, once it runs.
        message: why it failed.
    """

    id: str
    owner: str
    model: str
    work: Callable[[VolumePipeline, "Job"], object]
    state: str = QUEUED
    loading: bool = False
    step: int = 0
    steps: int = 0
    message: str = ""
    warnings: list[str] = field(default_factory=list)
    result: object = None
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in (DONE, FAILED, CANCELED)


class Worker:
    """The queue and its thread. One model is in memory; a job that needs another has it loaded in its place.

    Args:
        load: returns the pipeline of a name; it is called in the thread.
        first: name of the pipeline that is loaded at the start.
        on_failure: is told why that one could not be loaded.

    Attributes:
        models: by name, all that were loaded so far.
        loaded: is set once the first is.
    """

    def __init__(
        self, load: Callable[[str], VolumePipeline], first: str, on_failure: Callable[[BaseException], object]
    ) -> None:
        self._load, self._first, self._on_failure = load, first, on_failure
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._jobs: dict[str, Job] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._in_memory: tuple[str, VolumePipeline] | None = None  # nothing else keeps the pipeline
        self.models: dict[str, StudioModel] = {}
        self.loaded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, owner: str, model: str, work: Callable[[VolumePipeline, Job], object]) -> Job:
        """Add work to the queue. Raises: ValueError if its owner has too much waiting."""
        with self._lock:
            for old in [job for job in self._jobs.values() if job.owner == owner and job.over][:-MOST_WAITING]:
                del self._jobs[old.id]
            mine = [job for job in self._jobs.values() if job.owner == owner and not job.over]
            if len(mine) >= MOST_WAITING:
                raise ValueError(f"{MOST_WAITING} volumes are waiting already; wait for one of them, or cancel it")
            job = Job(str(next(self._numbers)), owner, model, work)
            self._jobs[job.id] = job
        self._waiting.put(job)
        return job

    def find(self, owner: str, number: str) -> Job | None:
        """Return a job of an owner."""
        job = self._jobs.get(number)
        return job if job is not None and job.owner == owner else None

    def of(self, owner: str) -> list[Job]:
        """Return the jobs of an owner that are not over, in order."""
        return [job for job in list(self._jobs.values()) if job.owner == owner and not job.over]

    def position(self, job: Job) -> int:
        """Return how many jobs, of whomever, come before this one."""
        before = itertools.takewhile(lambda other: other is not job, list(self._jobs.values()))
        return sum(not other.over for other in before)

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or end it after the step that it is at."""
        job.stop.set()
        with self._lock:
            if job.state == QUEUED:
                job.state = CANCELED

    def cancel_all(self, owner: str) -> None:
        """Cancel what an owner has waiting, and forget it."""
        for job in self.of(owner):
            self.cancel(job)

    def close(self) -> None:
        """Cancel everything, and wait for the thread to end."""
        for job in list(self._jobs.values()):
            self.cancel(job)
        self._waiting.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            self._pipe(Job("", "", self._first, lambda *_: None))
        except BaseException as error:
            self._on_failure(error)
            return
        self.loaded.set()
        while (job := self._waiting.get()) is not None:
            with self._lock:
                if job.stop.is_set():
                    job.state = CANCELED
                    continue
                job.state = RUNNING
            try:
                job.result = job.work(self._pipe(job), job)
                job.state = DONE
            except Canceled:
                job.state = CANCELED
            except Exception as error:
                message = users_message(error)
                job.message = message or f"{type(error).__name__}: {error} (a fault of the studio; its log has more)"
                job.state = FAILED
                if message is None:
                    logger.exception("a volume could not be generated")

    def _pipe(self, job: Job) -> VolumePipeline:
        """Return the pipeline of a job; it is loaded if another is in memory, which is freed first.

        Raises: Canceled if the job was canceled meanwhile. What loading raises.
        """
        if self._in_memory is None or self._in_memory[0] != job.model:
            job.loading = True
            self._in_memory = None  # frees the other one: nothing else refers to it
            pipe = self._load(job.model)
            self.models[job.model] = StudioModel.of(job.model, pipe)
            self._in_memory = job.model, pipe
            job.loading = False
            if job.stop.is_set():
                raise Canceled
        return self._in_memory[1]


@dataclass(frozen=True)
class Generated:
    """A volume on disk."""

    path: Path
    record: GenerationRecord
    request: VolumeRequest
    seconds: float

    @property
    def files(self) -> list[Path]:
        """The files that hold it."""
        return channel_files(self.path, self.record.channels)


def generate(
    pipe: VolumePipeline, request: VolumeRequest, sampling: SamplingConfig, seed: int, folder: Path, job: Job
) -> Generated:
    """Generate the volume that `medvolume generate --seed SEED` makes of this request, into a folder.

    Raises: ValueError for what cannot be used. Canceled once the job is canceled; nothing is written then.
    """
    start = time.perf_counter()
    data = pipe.data
    rejection = None if data.maps is None else Rejection([map_check(data.maps, data.image_labels)])
    with noted(job.warnings):
        [task] = plan_volumes(pipe, [request], [0], sampling, rejection, seed=seed, output=folder)
    check_memory(pipe, [task], 1)
    record = _write(pipe, task, sampling, seed, rejection, job)
    return Generated(task.path, record, task.request, time.perf_counter() - start)


def _write(
    pipe: VolumePipeline,
    task: PlannedVolume,
    sampling: SamplingConfig,
    seed: int,
    rejection: Rejection | None,
    job: Job,
) -> GenerationRecord:
    """Generate a planned volume and write it; return its record."""
    volumes = prepared_volumes(pipe, [task], sampling)

    def after_step(pipe: MedVolumePipeline, step: int, *_: object) -> None:
        job.step, job.steps = step + 1, pipe.num_timesteps
        if job.stop.is_set():
            # `pipe._interrupt` would still decode and write what there is.
            raise Canceled

    step_end = StepEnd(after_step)
    if rejection is None:
        generators = [torch.Generator().manual_seed(task.seed)]
        [sample] = pipe.generate(volumes, sampling, generators, paths=[task.path], step_end=step_end)
        if sample.fault is not None:
            raise ValueError(sample.fault)
        return sample.record

    def attempts(_: Sequence[int], seeds: Sequence[int]) -> list[Attempt]:
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        samples = pipe.generate(volumes, sampling, generators, step_end=step_end)
        return [Attempt(sample.output, sample.record, sample.fault) for sample in samples]

    def seed_of(_: int, rejections: int) -> int:
        return volume_seed(seed, task.request.name, task.k, rejections)

    [outcome] = rejection.sample_until_accepted(1, attempts, seed_of)
    if outcome.accepted is None:
        raise ValueError(f"{task.path.name}: {outcome.reason}")
    write_synthetic(outcome.accepted.image, outcome.accepted.record.to_json(), task.path)
    return outcome.accepted.record


@contextmanager
def noted(messages: list[str]) -> Iterator[None]:
    """Add the warnings of a block to a list, each once, in place of showing them. Blocks wait for each other."""
    with _listening, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            texts = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
            messages += [text for text in dict.fromkeys(texts) if text not in messages]
