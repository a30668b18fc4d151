"""The volumes of one generation command: each with its file, its seed and its record, before the first is generated.

A request is read, hashed and checked once, here; what it was read to is passed on to the pipeline.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipelines.base import VolumePipeline
from pipelines.inputs.prepared import PreparedVolume
from pipelines.inputs.request import VolumeRequest
from pipelines.rejection import Rejection
from pipelines.sampling import SamplingConfig
from pipelines.storage.provenance import channel_files
from pipelines.storage.record import GenerationRecord
from volumes import draw_shape
from volumes.formats.raw import memory_bytes

MAX_NAME_BYTES = 255  # of a file
HELD_BYTES = 1 << 30  # of masks and images that are held from planning to generation; more are read again


@dataclass(frozen=True)
class PlannedVolume:
    """Volume k of a request.

    Attributes:
        request: with the shape of this volume, where no file sets one.
        path: its file.
        shape: that of the request, or of the padded grid.
        unseeded: the record that all volumes of the request and shape share.
        prepared: shared likewise; None where it was too much to hold.
    """

    request: VolumeRequest
    k: int
    path: Path
    shape: tuple[int, int, int]
    seed: int
    unseeded: GenerationRecord
    prepared: PreparedVolume | None

    @property
    def record(self) -> GenerationRecord:
        """The volume's future sidecar."""
        return replace(self.unseeded, seed=self.seed)

    @property
    def batch_key(self) -> Hashable:
        """Volumes that agree in it can share a batch: the shape, and the kind of edit."""
        edit = self.request.edit
        return self.shape, None if edit is None else (edit.strength, edit.region is None)

    @property
    def files(self) -> list[Path]:
        """The files that hold the volume."""
        return channel_files(self.path, self.unseeded.channels)


def volume_path(output: Path, name: str, k: int) -> Path:
    """The file of volume k of a request of that name."""
    return output / f"{name}_{k:03d}.nii.gz"


def volume_seed(seed: int, name: str, k: int, rejections: int = 0) -> int:
    """63 bits of a hash of (seed, name, k): the same everywhere and always, different for every volume, and for every
    attempt at it."""
    text = f"{seed}/{name}/{k}" + (f"/{rejections}" if rejections else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def plan_volumes(
    pipe: VolumePipeline,
    requests: Sequence[VolumeRequest],
    ks: Sequence[int],
    sampling: SamplingConfig,
    rejection: Rejection | None,
    *,
    seed: int,
    output: Path,
) -> list[PlannedVolume]:
    """Volumes `ks` of each request. Prepares every request, so that what is wrong is found before hours of work.

    Args:
        seed: of the command, see `volume_seed`.
        output: the folder of the volumes.
    Raises: ValueError naming all masks and rows that cannot be used.
    """
    planned: list[PlannedVolume] = []
    refused, held = [], 0
    for request in requests:
        prepared = None
        for k in ks:
            own_seed = volume_seed(seed, request.name, k)
            sized = _with_shape(pipe, request, own_seed)
            path = volume_path(output, request.name, k)
            try:
                if prepared is None or prepared.request.shape != sized.shape:
                    [prepared] = pipe.prepare([sized], sampling)
                    record = prepared.record if rejection is None else rejection.plan(prepared.record)
                    held += prepared.grid.held_bytes
                    check_file_names(volume_path(output, request.name, ks[-1]), record)
            except ValueError as error:
                refused.append(f"{request.name}: {error}")
                break
            kept = prepared if held <= HELD_BYTES else None
            x, y, z = sized.shape or prepared.shape
            planned.append(PlannedVolume(sized, k, path, (x, y, z), own_seed, record, kept))
    if refused:
        raise ValueError("masks or conditions that cannot be used:\n" + "\n".join(refused))
    return planned


def _with_shape(pipe: VolumePipeline, request: VolumeRequest, seed: int) -> VolumeRequest:
    """The request with the shape of a training map, where neither a file nor --shape sets one and the model knows
    any."""
    if request.files or request.shape is not None or pipe.data.maps is None:
        return request
    return replace(request, shape=draw_shape(pipe.data.maps, seed))


def prepared_volumes(
    pipe: VolumePipeline, batch: Sequence[PlannedVolume], sampling: SamplingConfig
) -> list[PreparedVolume]:
    """The volumes of a batch, prepared: those that were too much to hold, again. Raises: ValueError if their files
    changed."""
    missing = [task for task in batch if task.prepared is None]
    try:
        again = iter(pipe.prepare([task.request for task in missing], sampling))
    except ValueError as error:
        names = ", ".join(task.path.name for task in missing)
        raise ValueError(f"{names}: files changed after they were checked: {error}") from error
    volumes = [task.prepared or next(again) for task in batch]
    check_unchanged(batch, volumes)
    return volumes


def check_unchanged(batch: Sequence[PlannedVolume], volumes: Sequence[PreparedVolume]) -> None:
    """Raises: ValueError for a volume that was prepared from other files than it was planned from."""
    for task, volume in zip(batch, volumes, strict=True):
        if volume.record != replace(task.unseeded, checks={}, rejected=None):
            raise ValueError(
                f"{task.path.name}: its mask or images changed after they were checked; run the command again"
            )


def check_file_names(path: Path, record: GenerationRecord) -> None:
    """Raises: ValueError if a file of the volume has a longer name than file systems take."""
    for file in channel_files(path, record.channels):
        if len(os.fsencode(file.name)) > MAX_NAME_BYTES:
            raise ValueError(
                f"its file {file.name[:40]!r}... would have a name of more than {MAX_NAME_BYTES} bytes; shorten it"
            )


def check_memory(pipe: VolumePipeline, tasks: Sequence[PlannedVolume], batch_size: int) -> None:
    """Raises: ValueError if a batch cannot fit into memory: by its first feature map alone, which is a small part of
    it."""
    counts = Counter(task.shape for task in tasks)
    device = pipe.device
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
    for shape, count in counts.items():
        positions = math.prod(-(-side // stride) for side, stride in zip(shape, pipe.vae.stride, strict=True))
        volume = positions * pipe.unet.config["channels"][0] * pipe.unet.dtype.itemsize
        together = min(count, batch_size)
        if together * volume > room:
            remedy = f"--batch_size {max(room // volume // 4, 1)}" if volume <= room else "smaller volumes"
            raise ValueError(
                f"{together} volumes of {' x '.join(map(str, shape))} voxels at a time need more than "
                f"{together * volume / 2**30:.0f} GiB of memory, {room / 2**30:.0f} GiB is what there is; ask for "
                f"{remedy}"
            )
