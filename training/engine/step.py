"""What a model gives to the engine: its training step, its data, and what to do at the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate

from .learner import Learner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Items(Protocol):
    """Numbered samples: a map-style data set, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TrainingStep(Protocol):
    """Losses of a model and the networks that learn from them."""

    @property
    def learners(self) -> Sequence[Learner]:
        """The networks that are trained; the first one is what the run leaves."""
        ...

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Names of the metrics of `validate`, each with whether more is better; the first one chooses the best
        weights."""
        ...

    def __call__(self, batch: Any, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Compute the losses of a batch and call `learner.backward` on them.

        All randomness comes from `generators`, one per sample, so that it makes no difference how a global batch is
        divided over processes and accumulated batches. Returns: detached scalars to log.
        """
        ...

    def after_update(self, taken: bool) -> None:
        """Update state that does not move by gradients. Called after each optimizer step, with whether it was taken."""
        ...

    def review(self, values: dict[str, float]) -> list[str]:
        """Return warnings about the mean losses of the last steps, each with a remedy; usually none."""
        ...

    def validate(self, item: Any, generator: torch.Generator) -> dict[str, float]:
        """Return metrics of one held-out item, with the averaged weights."""
        ...

    def preview(self, items: list[Any]) -> "Figure":
        """Draw a few held-out items, with the averaged weights."""
        ...


@runtime_checkable
class Generates(TrainingStep, Protocol):
    """A step whose model generates volumes, which are compared with held-out ones."""

    distance: str  # name of what `compare` returns that chooses the best weights, if asked to; less is better

    @property
    def max_samples(self) -> int:
        """Volumes that can be compared, at most."""
        ...

    def sample(self, item: Any, number: int, count: int, generator: torch.Generator) -> Any:
        """Generate a volume from the conditions of a held-out item, with the averaged weights.

        Args:
            number: of the volume, from 0 to `count` - 1.
        Returns: a row for `compare`, which can be sent to other processes.
        """
        ...

    def compare(self, rows: Sequence[Any]) -> dict[str, float]:
        """Return the distance of generated from held-out volumes, and figures to judge it by."""
        ...


@dataclass
class Training:
    """Everything that `run_training` needs of a model.

    Args:
        step: losses and learners; None if the model has no parameters, so that there is only `finish` to do.
        finish: writes what the run leaves. Called by the main process, after the last step.
        measure: what all processes do together before that.
        data: training samples; `collate` makes batches of them.
        validation: held-out items, whole, one at a time; may be empty.
        contents: a digest of each training volume, by name; a resumed run must have the same.
    """

    step: TrainingStep | None
    finish: Callable[[], None]
    data: Items = ()
    validation: Items = ()
    collate: Callable[[Any], Any] = default_collate
    contents: Mapping[str, str] = field(default_factory=dict)
    measure: Callable[[], None] | None = None
