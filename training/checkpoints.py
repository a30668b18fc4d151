"""Checkpoints: everything that a resumed run needs, in one folder that is either complete or not there.

    checkpoints/step_000500/
        model.safetensors, optimizer.bin, random_states_0.pkl, ...    Accelerate's
        <learner>_ema.safetensors                                     moving averages
        state.json                                                    step, data position, counters
        rng_0.txt                                                     digest of the random state (see `load`)

Data order, crops and noise need no entry: they are functions of (seed, position). Accelerate's .bin and .pkl files are
pickles, so only checkpoints inside the run's own folder are ever read.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from .learner import Learner


@dataclass
class TrainState:
    """Counters of a run.

    Args:
        step: optimiser steps so far, skipped ones included.
        samples: training samples seen by all processes together.
        skipped: steps without effect because a gradient was not finite; `skipped_in_a_row` of them most recently.
        updates: steps taken, by learner.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    updates: dict[str, int] = field(default_factory=dict)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((p for p in folder.glob("step_*") if p.is_dir()), key=lambda p: int(p.name.removeprefix("step_")))


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


def rng_digest() -> str:
    """Fingerprint of torch's global random state."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


class Checkpointer:
    """Writes, thins out and reads the checkpoints of one run."""

    def __init__(self, accelerator: Accelerator, learners: Sequence[Learner], folder: Path, keep: int):
        self.accelerator, self.learners, self.folder, self.keep = accelerator, learners, folder, keep
        if accelerator.is_main_process:
            for leftover in folder.glob(".partial_*"):  # a run that was killed while writing
                shutil.rmtree(leftover)

    def save(self, state: TrainState) -> Path:
        """Write checkpoints/step_XXXXXX: a temporary folder, renamed when complete. Called by every process."""
        accelerator, name = self.accelerator, f"step_{state.step:06d}"
        partial, final = self.folder / f".partial_{name}", self.folder / name
        accelerator.save_state(str(partial), safe_serialization=True)
        (partial / f"rng_{accelerator.process_index}.txt").write_text(rng_digest())
        if accelerator.is_main_process:
            for learner in self.learners:
                state.updates[learner.name] = learner.updates
                average = {k: v.contiguous() for k, v in learner.average.state_dict().items()}
                save_file(average, partial / f"{learner.name}_ema.safetensors")
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            for old in list_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return final

    def load(self, path: Path) -> TrainState:
        """Restore everything from `path`.

        Raises: ValueError if the run began without one of the learners, or if the random state was not restored, which
        Accelerate merely logs; RuntimeError if weights do not fit the model.
        """
        state = TrainState(**json.loads((path / "state.json").read_text()))
        if absent := sorted({learner.name for learner in self.learners} - state.updates.keys()):
            raise ValueError(
                f"{path}: holds no {' and no '.join(absent)}, which this config trains; resume as the run began, or "
                "start another run (--output) from its weights (--init_from)"
            )
        self.accelerator.load_state(str(path))
        for learner in self.learners:
            learner.average.load_state_dict(load_file(path / f"{learner.name}_ema.safetensors"), strict=True)
            learner.updates = state.updates[learner.name]
        saved = path / f"rng_{self.accelerator.process_index}.txt"
        if not saved.is_file():
            raise ValueError(f"{path}: written by fewer processes than this run has; resume with as many as before")
        if saved.read_text() != rng_digest():
            raise ValueError(f"{path}: the random state could not be restored; is random_states_*.pkl damaged?")
        return state
