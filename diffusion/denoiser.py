"""LatentDenoiser: what pipelines and training ask of a U-Net, whoever designed it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from diffusers.loaders import PeftAdapterMixin
from torch import Tensor

from autoencoder.model import VolumeModel
from volumes.data.subjects import SubjectRecord

from .conditioning import ConditionSchema
from .folding import fold_mask
from .objectives import TRAIN_STEPS, fit_scheduler, make_scheduler, shift_of
from .scheduler_options import Betas, Scheduler

if TYPE_CHECKING:
    from autoencoder import VolumeAutoencoder

    from .completion import DataFacts


CONTROLNET = (
    "ControlNets are not trained here: give --init_from the folder of a U-Net (PIPELINE/unet), or train a "
    "diffusion.LatentUNet3D, which masks condition"
)


class LossSettings(TypedDict):
    """The arguments of `training_loss` that a U-Net decides."""

    train_steps: int
    shift_voxels: int | None
    shift_power: float
    betas: Betas | None


class LatentDenoiser(VolumeModel, PeftAdapterMixin, ABC):
    """A U-Net over latents: `LatentUNet3D`, `MonaiUNet3D` or `MedDDPMUNet3D`. Called as
    `unet(latents, timestep, **conditions)`, where `conditions` are those of its `condition_schema`
    (`Conditions.as_kwargs`), it predicts its `objective`.

    Its config has at least in_channels, out_channels, channels, objective, train_steps, shift_voxels and subjects.
    """

    lora_subjects: dict[str, Sequence[SubjectRecord] | None]  # of each attached LoRA; set when one is loaded

    known_numbers: tuple[str, ...] = ()  # numbers that it takes whatever their statistics in its training set
    stride: int = 1  # sides of the latents are multiples of it
    shift_power: float = 0.5  # of the number of latent voxels, in the shift of timesteps
    mask_stride: tuple[int, int, int]  # of a model with masks
    bound: float | None = None  # largest absolute value of a clean latent, to which samplers clip; None if unknown
    mask_halo: int = 0  # latent voxels around one, whose labels its embedding depends on

    @classmethod
    @abstractmethod
    def complete(
        cls, section: Mapping[str, Any], vae: "VolumeAutoencoder", data: "DataFacts", images: Mapping[str, slice]
    ) -> dict[str, object]:
        """Return a model section with the entries that autoencoder and data decide, see `complete_model`."""

    @property
    @abstractmethod
    def condition_schema(self) -> ConditionSchema:
        """The conditions that this model knows. Raises: ValueError for a config that contradicts itself."""

    @property
    def train_steps(self) -> int:
        """Number of steps of the schedule that it was trained with."""
        return self.config["train_steps"] or TRAIN_STEPS

    @property
    def betas(self) -> Betas | None:
        """The noise schedule of v and eps that it was trained with; None for ours, the cosine schedule."""
        return None

    @property
    def takes_next_timestep(self) -> bool:
        """Whether it predicts the average velocity to a second time, `next_timestep`."""
        return False

    @property
    def takes_partial_masks(self) -> bool:
        """Whether masks may hold `volumes.UNKNOWN`."""
        return False

    @property
    def num_labels(self) -> int:
        """Number of labels of the masks that condition it; 0 for a model without."""
        return self.config.get("num_labels") or 0

    @property
    def loss_settings(self) -> LossSettings:
        """How `training_loss` noises its latents."""
        return {
            "train_steps": self.train_steps,
            "shift_voxels": self.config["shift_voxels"],
            "shift_power": self.shift_power,
            "betas": self.betas,
        }

    def timestep_shift(self, sides: Sequence[int]) -> float:
        """Return the shift of timesteps on a grid of latents (h, w, d); 1 for a model without `shift_voxels`."""
        return shift_of(sides, self.config["shift_voxels"])

    def fitted(self, scheduler: Scheduler, shift: float = 1.0) -> Scheduler:
        """Return a scheduler like the given one that fits this model, see `fit_scheduler`."""
        return fit_scheduler(
            scheduler, self.config["objective"], self.train_steps, shift=shift, betas=self.betas, bound=self.bound
        )

    def new_scheduler(self, name: str | None = None, bound: float | None = None) -> Scheduler:
        """Build a scheduler for this model, see `make_scheduler`. The model's own `bound` comes first."""
        bound = bound if self.bound is None else self.bound
        return make_scheduler(self.config["objective"], self.train_steps, name=name, bound=bound, betas=self.betas)

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Embed label indices (B, X, Y, Z) as the mask's channels (B, C, h, w, d). Raises: ValueError for a model
        without masks, and for indices that are not labels."""
        ids = fold_mask(labels, self.mask_stride, self.num_labels, partial=self.takes_partial_masks)
        return self.embed_mask(ids)

    def embed_mask(self, ids: Tensor) -> Tensor:
        """Raise ValueError: this model takes no masks."""
        raise ValueError("this model was trained without a mask condition; omit `mask`")
