"""What a system of the comparison has: training for some seconds, and generation of one volume."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NotRequired, TypedDict

from volumes import VolumeDataset

from .tasks import Task


@dataclass(frozen=True)
class Settings:
    """How a system is run.

    Attributes:
        folder: for its files.
        checkout: its code; None for ours.
        device: such as cpu or cuda.
        width, hidden, timesteps: of its diffusion's network, of its autoencoder and of its schedule; None for its own.
        perceptual: whether Medical Diffusion's perceptual loss, which downloads weights, is used.
        root: folder of the data.
    Folders are absolute.
    """

    folder: Path
    checkout: Path | None = None
    device: str = "cpu"
    width: int | None = None
    hidden: int | None = None
    timesteps: int | None = None
    perceptual: bool = False
    root: Path | None = None


class Trained(TypedDict):
    """Figures of a training; `steps` are those of the diffusion, `seconds` of all."""

    steps: int
    autoencoder_steps: NotRequired[int]
    seconds: float
    parameters: int


class System(ABC):
    """One system on one data set.

    Attributes:
        takes_masks: whether it generates from label maps.
    """

    name: ClassVar[str]
    takes_masks: ClassVar[bool]

    @abstractmethod
    def __init__(self, dataset: VolumeDataset, task: Task, settings: Settings): ...

    @abstractmethod
    def train(self, seconds: float) -> Trained:
        """Train for so many seconds."""

    @abstractmethod
    def generate(self, index: int, seed: int, path: Path) -> None:
        """Write a volume (.nii.gz) and its sidecar, on the grid of a training volume.

        It is generated from that volume's label map if the task says so and the system can.
        """
