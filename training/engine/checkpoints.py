"""Checkpoints: everything that a resumed run needs, in one folder that is either complete or not there.

    checkpoints/step_000500/
        model.safetensors, optimizer.bin, random_states_0.pkl, ...    Accelerate's
        <learner>_ema.safetensors                                     moving averages
        <learner>.safetensors, <learner>_optimizer.bin                instead of Accelerate's, of weights that are sharded:
                                                                      put together, so they are as large as without
        state.json                                                    step, data position, counters
        rng_0.txt                                                     digest of the random state (see `load`)
        digests.json                                                  sha256 of all of these

Data order, crops and noise need no entry: they are functions of (seed, position). Accelerate's .bin and .pkl files are
pickles, so only checkpoints inside the run's own folder are ever read.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
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
from .processes import is_of_another
from .sharding import collect, restore

logger = logging.getLogger("training")
DIGESTS = "digests.json"
MAX_NAMED = 8  # files in a message


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written: an earlier one may be whole."""


@dataclass
class TrainState:
    """Counters of a run.

    Args:
        step: optimizer steps so far, skipped ones included.
        samples: training samples seen by all processes together.
        processes: how many wrote this; 0 if that was not recorded yet.
        sharded: whether they had divided weights.
        skipped: steps without effect because a gradient was not finite; `skipped_in_a_row` of them most recently.
        updates: steps taken, by learner.
    """

    step: int = 0
    samples: int = 0
    processes: int = 0
    sharded: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    updates: dict[str, int] = field(default_factory=dict)


def step_of(checkpoint: Path) -> int:
    """step_000500 -> 500."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdecimal()]
    return sorted((p for p in found if not p.is_symlink()), key=step_of)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `resume` means: "latest" (None if the run has none yet) or a folder inside `folder`.

    Raises: ValueError if the folder does not exist or belongs to another run.
    """
    if resume == "latest":
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise ValueError(
            f"--resume {resume}: no checkpoint there; this run has {[p.name for p in list_checkpoints(folder)]}"
        )
    if path.resolve().parent != folder.resolve():
        raise ValueError(
            f"--resume {resume}: checkpoints hold pickles, so only those of this run are read ({folder}); "
            "to start from another run's weights use --init_from with its final folder"
        )
    return path


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of every file but `DIGESTS`, by its path in the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_own(path: Path) -> dict[str, Any]:
    """An object of a checkpoint's. Raises: DamagedCheckpoint if it is none."""
    try:
        return read_object(path)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error


def rng_digest() -> str:
    """Fingerprint of torch's global random state."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


class Checkpointer:
    """Writes, thins out and reads the checkpoints of one run."""

    def __init__(
        self, accelerator: Accelerator, learners: Sequence[Learner], folder: Path, keep: int, sharded: bool = False
    ):
        self.accelerator, self.learners, self.folder, self.keep = accelerator, learners, folder, keep
        self.sharded = sharded

    def save(self, state: TrainState) -> Path:
        """Write checkpoints/step_XXXXXX: a hidden folder, renamed when complete and on the disk. Called by every process.

        Raises: RuntimeError if it cannot be written (a full disk, a folder that is not there any more); then nothing is left
        of it, and the run's other checkpoints stay.
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
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own for a full disk
            if is_of_another(error):
                raise
            whole = [path.name for path in list_checkpoints(self.folder)] or "none yet"
            raise CannotContinue(
                f"{final}: the checkpoint could not be written ({error}). Whole ones: {whole}. Make room on the disk, or lower "
                "loop.keep_checkpoints; then go on with --resume latest"
            ) from error
        self.accelerator.wait_for_everyone()
        return final

    @contextmanager
    def _unfinished(self, final: Path) -> Iterator[Path]:
        """The hidden folder that every process writes to; the main one makes it, and gives it its place."""
        with ExitStack() as stack:
            name: list[str] = [""]
            if self.accelerator.is_main_process:
                made = stack.enter_context(atomic_folder(final))
                name = [
                    "/".join(made.parts[-3:])
                ]  # below the folder of checkpoints, which may be elsewhere on another machine
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

    def resume(self, resume: str) -> tuple[Path, TrainState] | None:
        """Restore what `resume` means (see `find_checkpoint`), and return where it is; None if there is nothing yet. Called by
        every process.

        Of "latest", one that is damaged for any of the processes is passed over, and the next older one taken; newer ones
        than the one that is taken are set aside, so that they are not taken for this run's later.

        Raises: ValueError if none is whole, and as `find_checkpoint` and `load` do.
        """
        newest = find_checkpoint(resume, self.folder)
        if newest is None:
            return None
        candidates = [p for p in reversed(list_checkpoints(self.folder)) if step_of(p) <= step_of(newest)]
        refused = []
        for path in candidates if resume == "latest" else [newest]:
            for stage in (self.check, self.load):  # sharded weights are loaded together: not before all have checked
                error = None
                try:
                    state = stage(path)
                except DamagedCheckpoint as damage:
                    error = str(damage)
                if errors := [one for one in gather_object([error]) if one]:
                    refused += errors[:1]
                    logger.warning("%s", errors[0])
                    break
            else:
                self._set_aside(path)
                return path, state  # pyright: ignore[reportPossiblyUnboundVariable]
        raise ValueError("\n".join(["--resume: no whole checkpoint:", *refused]))

    def _set_aside(self, path: Path) -> None:
        self.accelerator.wait_for_everyone()
        for newer in [p for p in list_checkpoints(self.folder) if step_of(p) > step_of(path)]:
            logger.warning("%s: set aside as aside_%s, for the run goes on from %s", newer, newer.name, path.name)
            if self.accelerator.is_main_process:
                aside = newer.with_name(f"aside_{newer.name}")
                if aside.exists():
                    remove_folder(aside)
                newer.rename(aside)
        self.accelerator.wait_for_everyone()

    def check(self, path: Path) -> TrainState:
        """Whether `path` can be restored, as far as its files tell; nothing is changed.

        Raises: DamagedCheckpoint if a file is not what was written. ValueError for a link to another place; if the run began
        without one of the learners; or if it has another number of processes, or
        another `loop.fsdp`.
        """
        if links := [p.name for p in path.rglob("*") if not p.resolve().is_relative_to(path.resolve())]:
            raise ValueError(
                f"{path}: {links} are links to another place; a checkpoint is read from the run's own folder"
            )
        with _naming_damage(path):
            return self._check(path)

    def load(self, path: Path) -> TrainState:
        """Restore everything from `path`, of which every process knows that all have checked it.

        Raises: DamagedCheckpoint if weights do not fit the model; or if the random state was not restored, which Accelerate
        merely logs.
        """
        with _naming_damage(path):
            return self._load(path)

    def _check(self, path: Path) -> TrainState:
        if not (path / DIGESTS).is_file():
            raise DamagedCheckpoint(f"{path}: {DIGESTS} is missing; was it copied in part?")
        written, found = read_own(path / DIGESTS), digest_files(path)
        if wrong := sorted(name for name in {*written, *found} if written.get(name) != found.get(name)):
            named = [name if name.isprintable() else repr(name) for name in wrong[:MAX_NAMED]]
            more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
            raise DamagedCheckpoint(
                f"{path}: {', '.join(named)}{more}: not what was written; truncated, or changed since"
            )
        state = TrainState(**read_own(path / "state.json"))
        counters = [
            state.step,
            state.samples,
            state.processes,
            state.skipped,
            state.skipped_in_a_row,
            *state.updates.values(),
        ]
        if not all(type(count) is int and count >= 0 for count in counters):
            raise DamagedCheckpoint(f"{path}: state.json holds counters that are no counts: {counters}")
        if state.processes not in (0, self.accelerator.num_processes):
            raise ValueError(
                f"{path}: was written by {state.processes} processes, this run has {self.accelerator.num_processes}; launch "
                "as many as before"
            )
        if state.sharded is not self.sharded:
            raise ValueError(f"{path}: was written with loop.fsdp {state.sharded}; resume as the run began")
        if absent := sorted({learner.name for learner in self.learners} - state.updates.keys()):
            raise ValueError(
                f"{path}: holds no {' and no '.join(absent)}, which this config trains; resume as the run began, or "
                "start another run (--output) from its weights (--init_from)"
            )
        return state

    def _load(self, path: Path) -> TrainState:
        state = TrainState(**read_own(path / "state.json"))
        self.accelerator.load_state(str(path))
        for learner in self.learners:
            average = load_file(path / f"{learner.name}_ema.safetensors")
            if self.sharded:
                weights = load_file(path / f"{learner.name}.safetensors")
                moments = torch.load(path / f"{learner.name}_optimizer.bin", weights_only=True)
                state_of = {"model": weights, "average": average, "optimizer": moments}
                restore(learner.network, learner.ema.module, learner.optimizer, state_of)
            else:
                learner.average.load_state_dict(average, strict=True)
            learner.updates = state.updates[learner.name]
        if (path / f"rng_{self.accelerator.process_index}.txt").read_text() != rng_digest():
            raise DamagedCheckpoint(f"{path}: the random state could not be restored; is random_states_*.pkl damaged?")
        return state


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path}: {error.filename or error} is missing; was it copied in part?") from error
    except OSError:
        raise
    except Exception as error:  # safetensors, torch, pickle and json each have their own
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise DamagedCheckpoint(
            f"{path}: cannot be resumed from ({type(error).__name__}: {error}); it is damaged, or of another model. "
            "--resume latest takes the newest one that is whole"
        ) from error


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
