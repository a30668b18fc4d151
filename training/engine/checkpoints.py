"""Checkpoints: everything that a resumed run needs, in one folder that is complete or does not exist.

    checkpoints/step_000500/
        model.safetensors, optimizer.bin, random_states_0.pkl, ...    written by Accelerate <learner>_ema.safetensors
        moving averages <learner>.safetensors, <learner>_optimizer.bin                instead of Accelerate's files if
        weights are sharded:
                                                                      full tensors, as large as without sharding
        best.safetensors                                              the best averaged weights so far, if any
        state.json                                                    step, data position, counters, the best so far
        rng_0.txt                                                     digest of the random state (see `load`)
        digests.json                                                  sha256 of all of these

Data order, patches and noise need no entry: they are functions of (seed, position). Accelerate's .bin and .pkl files
are pickles, so only checkpoints inside the run's own folder are ever read.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli.command import CannotContinue
from files.atomic import atomic_folder, remove_folder
from files.documents import read_object

from .learner import Learner
from .processes import is_peer_failure
from .sharding import FullState, collect, on_main, restore, set_whole

logger = logging.getLogger("training")
DIGESTS = "digests.json"
BEST_WEIGHTS = "best.safetensors"
MAX_NAMED = 8  # files in a message


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from what was written. An earlier one may be intact."""


@dataclass
class TrainState:
    """Counters of a run.

    Args:
        step: optimizer steps so far, skipped ones included.
        samples: training samples that all processes together have seen.
        processes: number of processes that wrote this; 0 before the first checkpoint.
        sharded: whether the weights were sharded.
        skipped: steps without effect because a gradient was not finite.
        skipped_in_a_row: the most recent steps, if all of them were skipped.
        updates: steps that each learner took, by its name.
        best_metric, best_step, best_value: the best validation so far: metric, step, and value; None if there is none.
        stale: validations since then, all of them no better.
        validated, sampled: step of the last validation, and of the last comparison of generated volumes.
        snapshots: steps whose averages are stored (`loop.ema_snapshots`).
    """

    step: int = 0
    samples: int = 0
    processes: int = 0
    sharded: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    best_metric: str = ""
    best_step: int = 0
    best_value: float | None = None
    stale: int = 0
    validated: int = 0
    sampled: int = 0
    snapshots: list[int] = field(default_factory=list)

    def counts(self) -> list[int]:
        """Return all fields that are counts."""
        steps = [self.step, self.best_step, self.validated, self.sampled]
        skipped = [self.skipped, self.skipped_in_a_row, self.stale]
        return [*steps, self.samples, self.processes, *skipped, *self.updates.values(), *self.snapshots]


def step_of(checkpoint: Path) -> int:
    """step_000500 -> 500."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = [p for p in folder.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdecimal()]
    return sorted((p for p in folders if not p.is_symlink()), key=step_of)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """Find the checkpoint of `resume`: "latest" (None if the run has none yet), or a folder inside `folder`.

    Raises: ValueError if the folder does not exist or belongs to another run.
    """
    if resume == "latest":
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise ValueError(
            f"--resume {resume}: there is no checkpoint; this run has {[p.name for p in list_checkpoints(folder)]}"
        )
    if path.resolve().parent != folder.resolve():
        raise ValueError(
            f"--resume {resume}: checkpoints contain pickles, so only those of this run ({folder}) are read; "
            "to start from another run's weights, use --init_from with its final folder"
        )
    return path


def digest_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file except `DIGESTS`, by its path in the folder."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object of a checkpoint. Raises: DamagedCheckpoint if the file does not hold one."""
    try:
        return read_object(path)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error


def rng_digest() -> str:
    """Return a digest of torch's global random state."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


class Checkpointer:
    """Writes, reads and deletes the checkpoints of one run.

    Args:
        best: file of the run's best weights, which is copied into checkpoints once the state has a best value.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        learners: Sequence[Learner],
        folder: Path,
        keep: int,
        sharded: bool = False,
        best: Path | None = None,
    ):
        self.accelerator, self.learners, self.folder, self.keep = accelerator, learners, folder, keep
        self.sharded, self.best = sharded, best

    def save(self, state: TrainState) -> Path:
        """Write checkpoints/step_XXXXXX: a hidden folder, renamed once it is complete and on the disk. Called by every
        process.

        Raises: CannotContinue if it cannot be written (a full disk, a folder that was removed). Then nothing of it
            remains, and the run's other checkpoints stay.
        """
        final = self.folder / f"step_{state.step:06d}"
        try:
            with self._unfinished(final) as unfinished:
                self._write(unfinished, state)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    (unfinished / DIGESTS).write_text(json.dumps(digest_files(unfinished), indent=1))
            if self.accelerator.is_main_process:
                for old in list_checkpoints(self.folder)[: -self.keep]:
                    remove_folder(old)
        # torch and safetensors have exceptions of their own for a full disk.
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_peer_failure(error):
                raise
            complete = [path.name for path in list_checkpoints(self.folder)] or "none yet"
            raise CannotContinue(
                f"{final}: the checkpoint could not be written ({error}). Complete checkpoints: {complete}. Make room "
                "on the disk, or lower loop.keep_checkpoints; then continue with --resume latest"
            ) from error
        self.accelerator.wait_for_everyone()
        return final

    @contextmanager
    def _unfinished(self, final: Path) -> Iterator[Path]:
        """Yield the hidden folder that every process writes to. The main process makes it and renames it at the end."""
        with ExitStack() as stack:
            name: list[str] = [""]
            if self.accelerator.is_main_process:
                unfinished = stack.enter_context(atomic_folder(final))
                # Relative to the folder of checkpoints, whose path may differ on another machine.
                name = ["/".join(unfinished.parts[-3:])]
            broadcast_object_list(name)
            yield self.folder / name[0]

    def _write(self, folder: Path, state: TrainState) -> None:
        accelerator = self.accelerator
        state.processes, state.sharded = accelerator.num_processes, self.sharded
        accelerator.save_state(str(folder), safe_serialization=True)
        (folder / f"rng_{accelerator.process_index}.txt").write_text(rng_digest())
        for learner in self.learners:
            state.updates[learner.name] = learner.updates
            self._write_learner(learner, folder)
        if accelerator.is_main_process:
            if state.best_value is not None and self.best is not None:
                shutil.copyfile(self.best, folder / BEST_WEIGHTS)
            (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))

    def _write_learner(self, learner: Learner, folder: Path) -> None:
        if self.sharded:
            collected = collect(learner.network, learner.ema.module, learner.optimizer)
            average = collected["average"]
        else:
            average = learner.average.state_dict()
        if self.accelerator.is_main_process:
            save_file(_contiguous(average), folder / f"{learner.name}_ema.safetensors")
            if self.sharded:
                save_file(_contiguous(collected["model"]), folder / f"{learner.name}.safetensors")
                torch.save(collected["optimizer"], folder / f"{learner.name}_optimizer.bin")
        for length, tracked in learner.tracked.items():
            tensors = on_main(tracked.module)
            if self.accelerator.is_main_process:
                save_file(_contiguous(tensors), folder / tracked_file(learner, length))

    def resume(self, resume: str) -> tuple[Path, TrainState] | None:
        """Restore the checkpoint of `resume` (see `find_checkpoint`). Called by every process.

        With "latest", a checkpoint that is damaged for any process is skipped, and the next older one is tried. Newer
        checkpoints than the restored one are set aside, so that a later resume does not use them.

        Returns: its path and its state; None if there is no checkpoint yet.
        Raises: ValueError if none is intact, and as `find_checkpoint` and `load`.
        """
        newest = find_checkpoint(resume, self.folder)
        if newest is None:
            return None
        candidates = [p for p in reversed(list_checkpoints(self.folder)) if step_of(p) <= step_of(newest)]
        damages: list[str] = []
        for path in candidates if resume == "latest" else [newest]:
            state = self._restore(path, damages)
            if state is not None:
                self._set_aside(path)
                return path, state
        raise ValueError("\n".join(["--resume: there is no intact checkpoint:", *damages]))

    def _restore(self, path: Path, damages: list[str]) -> TrainState | None:
        """Check and load `path` in all processes; None, and an entry in `damages`, if it is damaged for any of them."""
        state = None
        # Sharded weights are loaded collectively, so all processes check before any loads.
        for stage in (self.check, self.load):
            damage = None
            try:
                state = stage(path)
            except DamagedCheckpoint as error:
                damage = str(error)
            if found := [message for message in gather_object([damage]) if message]:
                damages.append(found[0])
                logger.warning("%s", found[0])
                return None
        return state

    def _set_aside(self, path: Path) -> None:
        self.accelerator.wait_for_everyone()
        for newer in [p for p in list_checkpoints(self.folder) if step_of(p) > step_of(path)]:
            logger.warning("%s: set aside as aside_%s, because the run resumes from %s", newer, newer.name, path.name)
            if self.accelerator.is_main_process:
                aside = newer.with_name(f"aside_{newer.name}")
                if aside.exists():
                    remove_folder(aside)
                newer.rename(aside)
        self.accelerator.wait_for_everyone()

    def check(self, path: Path) -> TrainState:
        """Check that `path` can be restored, as far as its files tell. Changes nothing.

        Raises: DamagedCheckpoint if a file differs from what was written. ValueError for a link to another place; if
            the run was started without one of the learners, with another number of processes, or with another
            `loop.fsdp`.
        """
        if links := [p.name for p in path.rglob("*") if not p.resolve().is_relative_to(path.resolve())]:
            raise ValueError(
                f"{path}: {links} are links to another place; a checkpoint is read from the run's folder only"
            )
        with _naming_damage(path):
            return self._check(path)

    def load(self, path: Path) -> TrainState:
        """Restore everything from `path`, after all processes have checked it.

        Raises: DamagedCheckpoint if weights do not fit the model, or if the random state was not restored, which
            Accelerate only logs.
        """
        with _naming_damage(path):
            return self._load(path)

    def _check(self, path: Path) -> TrainState:
        if not (path / DIGESTS).is_file():
            raise DamagedCheckpoint(f"{path}: {DIGESTS} is missing; was the copy complete?")
        written, current = _read_json(path / DIGESTS), digest_files(path)
        if wrong := sorted(name for name in {*written, *current} if written.get(name) != current.get(name)):
            named = [name if name.isprintable() else repr(name) for name in wrong[:MAX_NAMED]]
            more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
            raise DamagedCheckpoint(
                f"{path}: {', '.join(named)}{more}: differs from what was written; truncated, or changed since"
            )
        state = TrainState(**_read_json(path / "state.json"))
        if not all(type(count) is int and count >= 0 for count in state.counts()):
            raise DamagedCheckpoint(f"{path}: state.json holds counters that are not counts: {state.counts()}")
        is_best = isinstance(state.best_value, float | int)
        if is_best is not (path / BEST_WEIGHTS).is_file() or is_best is (state.best_value is None):
            raise DamagedCheckpoint(f"{path}: state.json and {BEST_WEIGHTS} do not fit; was the copy complete?")
        if state.processes != self.accelerator.num_processes:
            raise ValueError(
                f"{path}: was written by {state.processes} processes, but this run has "
                f"{self.accelerator.num_processes}; launch as many as before"
            )
        if state.sharded is not self.sharded:
            raise ValueError(f"{path}: was written with loop.fsdp {state.sharded}; resume with the same setting")
        if absent := sorted({learner.name for learner in self.learners} - state.updates.keys()):
            raise ValueError(
                f"{path}: holds no {' and no '.join(absent)}, which this config trains; resume with the config that "
                "the run was started with, or start another run (--output) from its weights (--init_from)"
            )
        files = [tracked_file(learner, length) for learner in self.learners for length in learner.tracked]
        if any(not (path / name).is_file() for name in files):
            raise ValueError(
                f"{path}: was written without loop.ema_snapshots, whose averages begin with the run; set it to 0, or "
                "start another run (--output)"
            )
        return state

    def _load(self, path: Path) -> TrainState:
        state = TrainState(**_read_json(path / "state.json"))
        self.accelerator.load_state(str(path))
        for learner in self.learners:
            average = load_file(path / f"{learner.name}_ema.safetensors")
            if self.sharded:
                weights = load_file(path / f"{learner.name}.safetensors")
                moments = torch.load(path / f"{learner.name}_optimizer.bin", weights_only=True)
                full = FullState(model=weights, average=average, optimizer=moments)
                restore(learner.network, learner.ema.module, learner.optimizer, full)
            else:
                learner.average.load_state_dict(average, strict=True)
            for length, tracked in learner.tracked.items():
                tensors = load_file(path / tracked_file(learner, length))
                if self.sharded:
                    set_whole(tracked.module, tensors)
                else:
                    tracked.module.load_state_dict(tensors, strict=True)
            learner.updates = state.updates[learner.name]
        if (path / f"rng_{self.accelerator.process_index}.txt").read_text() != rng_digest():
            raise DamagedCheckpoint(f"{path}: the random state could not be restored; is random_states_*.pkl damaged?")
        return state


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path}: {error.filename or error} is missing; was the copy complete?") from error
    except OSError:
        raise
    except Exception as error:  # safetensors, torch, pickle and json each have their own
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise DamagedCheckpoint(
            f"{path}: cannot be resumed from ({type(error).__name__}: {error}); it is damaged, or belongs to another "
            "model. --resume latest uses the newest intact one"
        ) from error


def tracked_file(learner: Learner, length: float) -> str:
    """Name the file of a power-function average."""
    return f"{learner.name}_power_{length:.2f}.safetensors"


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
