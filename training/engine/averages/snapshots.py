"""Snapshots of a run's power-function averages, from which an average of any length is computed at its end.

    snapshots/step_000450_0.05.safetensors      the average of length 0.05 after step 450
    snapshots/step_000450_0.10.safetensors

A run keeps `loop.ema_snapshots` of each length, evenly spread over its steps, in float32: so many times twice the bytes
of the trained weights.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cli.command import CannotContinue
from files.atomic import atomic_file

from ..learner import Learner
from ..sharding import on_main
from .power import coefficients

SNAPSHOTS = "snapshots"  # folder in the output
KEY = "average"  # in a file's metadata: step, updates and length as JSON
NAME = re.compile(r"step_(\d+)_(\d\.\d+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """One stored average.

    Attributes:
        step: of the run; skipped steps count.
        updates: optimizer steps that were taken by then.
        length: relative length of the average.
    """

    path: Path
    step: int
    updates: int
    length: float


class Snapshots:
    """The snapshots of one run, of its first learner.

    Args:
        count: snapshots of a run of `max_steps`, of each length; 0 for none.
    """

    def __init__(self, accelerator: Accelerator, learner: Learner, output: Path, count: int, max_steps: int):
        self.accelerator, self.learner, self.folder = accelerator, learner, output / SNAPSHOTS
        self.count, self.max_steps = count, max_steps

    def begin(self, step: int) -> None:
        """Remove what a run that starts at `step` has not made: it makes it again."""
        if not self.accelerator.is_main_process:
            return
        for path in self.folder.glob("*.safetensors"):
            named = NAME.fullmatch(path.name)
            if named is not None and int(named[1]) > step:
                path.unlink()

    def is_due(self, step: int) -> bool:
        """Return whether the averages of `step`, from 1, are stored."""
        return step * self.count // self.max_steps > (step - 1) * self.count // self.max_steps

    def take(self, step: int) -> None:
        """Store the averages after `step`, unless they are there. Called by every process. Raises: CannotContinue if
        they cannot be written."""
        names = {length: self.folder / f"step_{step:06d}_{length:.2f}.safetensors" for length in self.learner.tracked}
        frozen = {name for name, weight in self.learner.network.named_parameters() if not weight.requires_grad}
        for length, average in self.learner.tracked.items():
            tensors = on_main(average.module)
            if not self.accelerator.is_main_process or names[length].exists():
                continue
            kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in frozen}
            # In one entry: safetensors writes several in any order, and equal snapshots would differ in their bytes.
            described = {KEY: json.dumps({"step": step, "updates": self.learner.updates, "length": length})}
            try:
                self.folder.mkdir(exist_ok=True)
                with atomic_file(names[length]) as unfinished:
                    save_file(kept, unfinished, described)
            except (OSError, SafetensorError) as error:
                raise CannotContinue(
                    f"{names[length]}: the snapshot could not be written ({error}). Make room on the disk, then "
                    "continue with --resume latest; or start with fewer loop.ema_snapshots"
                ) from error
        self.accelerator.wait_for_everyone()

    def stored(self) -> list[Snapshot]:
        """Return all snapshots, oldest first. Raises: CannotContinue for a damaged one."""
        found = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    facts = json.loads((file.metadata() or {})[KEY])
                found.append(Snapshot(path, int(facts["step"]), int(facts["updates"]), float(facts["length"])))
            except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
                raise CannotContinue(
                    f"{path}: is not a snapshot, or damaged ({error!r}); put a copy back, or use --loop.export last"
                ) from error
        return sorted(found, key=lambda one: (one.step, one.length))

    def check_complete(self, steps: Iterable[int]) -> None:
        """Raises: CannotContinue naming the snapshots of these steps that are gone: without them the average of a
        length would be another one."""
        there = {(one.step, f"{one.length:.2f}") for one in self.stored()}
        wanted = [(step, f"{length:.2f}") for step in steps for length in self.learner.tracked]
        if absent := [
            f"step_{step:06d}_{length}.safetensors" for step, length in wanted if (step, length) not in there
        ]:
            raise CannotContinue(
                f"{self.folder}: lacks {', '.join(absent[:4])}{f' and {len(absent) - 4} more' if absent[4:] else ''}, "
                "which the run stored; put them back, or use --loop.export last"
            )

    def average_of(self, length: float) -> Mapping[str, Tensor]:
        """Return the weights of the average of this length at the newest snapshot, and its buffers; without frozen
        weights. One snapshot is in memory at a time.

        Raises: CannotContinue if there are none, or for a damaged one.
        """
        stored = [one for one in self.stored() if one.updates > 0]
        if not stored:
            raise CannotContinue(
                f"{self.folder}: there are no snapshots; a run keeps them with loop.ema_snapshots, from its start on"
            )
        newest = stored[-1]
        shares = coefficients([one.updates for one in stored], [one.length for one in stored], newest.updates, length)
        averaged = {name for name, _ in self.learner.network.named_parameters()}
        total: dict[str, Tensor] = {}
        for one, share in zip(stored, shares, strict=True):
            with safe_open(one.path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    if name not in averaged:
                        total[name] = tensor  # of the newest, in the end
                    elif name in total:
                        total[name] += share * tensor.double()
                    else:
                        total[name] = share * tensor.double()
        return {name: tensor.to(torch.float32) if name in averaged else tensor for name, tensor in total.items()}
