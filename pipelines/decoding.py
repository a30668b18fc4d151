"""From denoised latents to the output of a call: decoded, in original units, and written. Axes: (C, X, Y, Z)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from autoencoder import VolumeAutoencoder
from autoencoder.residual_noise import ResidualNoiseModel
from pipelines.storage.output import MedVolumePipelineOutput
from pipelines.storage.provenance import channel_files, header_description, synthetic_files
from pipelines.storage.record import GenerationRecord
from volumes import VoxelError

from .sampling import Sample
from .volume_processor import VolumeProcessor


class NotFinite(VoxelError):
    """What the autoencoder decoded is not finite."""


@dataclass(frozen=True)
class VolumeDecoder:
    """Decodes the volumes of a call.

    Attributes:
        noise_model: adds the residual noise; None for none.
        output_type: see `MedVolumePipelineOutput`.
    """

    vae: VolumeAutoencoder
    processor: VolumeProcessor
    noise_model: ResidualNoiseModel | None
    output_type: str

    def finish(self, sample: Sample, latent: torch.Tensor) -> None:
        """Decode one volume, alone (memory does not grow with the batch), and write it if it has a path. Sets its
        `output`; or its `fault`, if the voxels are not finite or do not fit the type of the file."""
        record, grid, path = sample.record, sample.prepared.grid, sample.path
        try:
            if self.output_type == "latent":
                [sample.output] = _finite([latent], record)
                return
            slabs = self.processor.emptied(_finite(self._decode(latent), record), grid)
            if self.noise_model is not None:
                generator = sample.generator
                seed = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device)
                slabs = self.noise_model.add(slabs, int(seed))
            description = header_description(record)
            if path is None:
                with _naming_seed(record):
                    sample.output = self.processor.postprocess(slabs, grid, self.output_type, description)
                return
            with synthetic_files(record.to_json(), path) as unfinished, _naming_seed(record):
                self.processor.write(slabs, grid, unfinished, description)
            channels = record.channels
            sample.output = path if not channels else dict(zip(channels, channel_files(path, channels), strict=True))
        except VoxelError as error:
            sample.fault = str(error) if path is None else f"{path}: {error}"

    def _decode(self, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        """The slabs (C, X, Y, z) of one volume: as the autoencoder streams them, or a single one where it does not."""
        latents = latent[None].to(self.vae.dtype)
        if self.vae.tiles([n * s for n, s in zip(latent.shape[1:], self.vae.stride, strict=True)]):
            for slab in self.vae.decode_slabs(latents):
                yield slab[0]
        else:
            yield self.vae.decode(latents, return_dict=False)[0][0]


def call_output(samples: Sequence[Sample], return_dict: bool) -> MedVolumePipelineOutput:
    """What a call returns. Raises: VoxelError if the voxels of some volumes cannot be written; all others are."""
    if faults := [sample.fault for sample in samples if sample.fault is not None]:
        raise VoxelError("\n".join(faults))
    volumes = [sample.output for sample in samples]
    if not return_dict:
        return (volumes,)  # pyright: ignore[reportReturnType]
    return MedVolumePipelineOutput(volumes=volumes, provenance=[sample.record.to_json() for sample in samples])


def _finite(slabs: Iterable[torch.Tensor], record: GenerationRecord) -> Iterator[torch.Tensor]:
    """The same slabs. Raises: VoxelError naming the volume's seed if a value is not finite."""
    for slab in slabs:
        if not torch.isfinite(slab).all():
            narrow = "float16" in record.dtype.split()  # whose largest number is 65,504
            remedy = (
                "use bfloat16 or float32" if narrow else "look for NaN in the weights, the latents and the conditions"
            )
            raise NotFinite(f"the volume of seed {record.seed} is not finite in {record.dtype}; {remedy}")
        yield slab


@contextmanager
def _naming_seed(record: GenerationRecord) -> Iterator[None]:
    """Name the volume's seed in errors about voxels in the units of its file."""
    try:
        yield
    except NotFinite:
        raise
    except VoxelError as error:
        raise VoxelError(f"the volume of seed {record.seed}: {error}") from error
