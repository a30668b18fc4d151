"""Latents of a whole data set on disk: mean and standard deviation of each volume's posterior, so that training draws z
again each time.

Each entry is a safetensors file, in a folder named by a hash of the autoencoder, the data and the augmentation. So a
stale cache is never read; another one is built beside it. Latents (C, h, w, d); masks (X, Y, Z) int16 label indices,
padded to the stride with `PADDING`. Each entry holds a digest of its name and tensors (`entry`): a damaged one
is made again.
"""

import contextlib
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset

from autoencoder import VolumeAutoencoder
from autoencoder.cache_config import LatentCacheConfig
from autoencoder.layers import as_stride
from autoencoder.losses.reconstruction import cells_inside
from autoencoder.model import deciding
from cli.live_bar import LiveBar
from files.atomic import atomic_file, remove_leftovers
from files.cache import touch
from files.remote import is_url, plain_path
from volumes import PADDING, Placement, VolumeDataset, pad_or_crop, pad_to_multiple
from volumes.data.dataset import Sample
from volumes.foreground import background_index

from ..conditioning import Conditions
from ..folding import fold_mask
from ..images import image_condition
from .entry import DamagedEntry, EntryReader, check_latents, write_entry
from .store import LatentStore

logger = logging.getLogger(__name__)
SMOOTHNESS = 6.0  # voxels: standard deviation of the Gaussian that smooths random displacements
AS_THEY_ARE = LatentCacheConfig()  # one version of each volume
FORMAT = 3  # part of the key: raise it when entries are made differently


def weights_hash(model: torch.nn.Module) -> str:
    """Compute the SHA-256 over the names, dtypes, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_key(dataset: VolumeDataset, vae: VolumeAutoencoder, config: LatentCacheConfig, seed: int = 0) -> str:
    """Hash what the latents depend on: format, encoder and its config, the prepared volumes in their order (by content
    and settings, see `volumes.prepared.keys`, and by their voxels as training sees them), augmentation. Names and times
    of files, the decoder and the cache's folder do not change them."""
    augmentation = {name: value for name, value in asdict(config).items() if name != "folder"} | {"seed": seed}
    if dataset.config.empty_background:
        augmentation["empty_background"] = True
    volumes = [[key, facts.digest] for key, facts in zip(dataset.keys, dataset.facts, strict=True)]
    parts = [FORMAT, weights_hash(vae.encoder), deciding(vae.config), volumes, augmentation]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def deformed(
    image: Tensor,
    mask: Tensor | None,
    config: LatentCacheConfig,
    generator: torch.Generator,
    spacing: Sequence[float] = (1, 1, 1),
    order: int = 3,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rotate, scale and bend a volume about its center, at random: image (C, X, Y, Z) by splines of `order`, mask (X,
    Y, Z) by the nearest voxel, and fov (X, Y, Z), False where the result shows voxels from outside the volume, or from
    outside its field of view `seen` (X, Y, Z).

    Rotations are in mm space, with voxels `spacing` apart. Outside, the image is -1 and the mask `PADDING`. The
    displacement is white noise smoothed by a Gaussian (Simard et al. 2003).
    """
    random = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    shape = np.array(image.shape[1:])[:, None, None, None]
    angles = random.uniform(-config.rotate, config.rotate, 3)
    scales = 1 + random.uniform(-config.scale, config.scale, 3)
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    matrix = rotation * np.asarray(spacing) / np.asarray(spacing)[:, None] * scales
    places = np.einsum("ij,jxyz->ixyz", matrix, np.indices(image.shape[1:]) - (shape - 1) / 2) + (shape - 1) / 2
    if config.deform:
        smoothed = (2 * math.pi**0.5 * SMOOTHNESS) ** -1.5  # standard deviation of smoothed white noise
        noise = random.standard_normal(places.shape)
        bent = [ndimage.gaussian_filter(axis, SMOOTHNESS, mode="wrap", truncate=3) for axis in noise]
        places += config.deform / smoothed * np.stack(bent)
    fov = torch.from_numpy(((places > -0.5) & (places < shape - 0.5)).all(0))
    if seen is not None:  # its edge is that of the volume: the nearest voxels are repeated beyond it
        nearest: Any = ndimage.distance_transform_edt(~seen.numpy(), return_distances=False, return_indices=True)
        image = image[:, *torch.from_numpy(nearest).long()]
        inside = ndimage.map_coordinates(seen.numpy().astype(np.uint8), places, order=0, mode="nearest")
        fov &= torch.from_numpy(inside) > 0
    moved = [ndimage.map_coordinates(channel, places, order=order, mode="nearest") for channel in image.numpy()]
    seen = torch.where(fov, torch.from_numpy(np.stack(moved)).clamp(image.min(), image.max()), -1.0)
    if mask is None:
        return seen, None, fov
    labels = ndimage.map_coordinates(mask.to(torch.int16).numpy(), places, order=0, mode="nearest")
    return seen, torch.where(fov, torch.from_numpy(labels), PADDING), fov


def _version(
    item: Sample,
    stride: Sequence[int],
    config: LatentCacheConfig,
    seed: int,
    index: int,
    version: int,
    order: int,
    background: int | None = None,
) -> dict[str, Tensor]:
    """Return one version of a volume, padded to multiples of the stride: image (1, C, X, Y, Z), fov (1, 1, X, Y, Z),
    and mask (X, Y, Z) if there is one. `order` is the order of the splines that deform images.
    Splines swing beside edges: where the label index is `background`, which is empty, the image is -1 again.
    """
    image, mask = item["image"], item.get("mask")
    shape = tuple(image.shape[1:])
    fov = item["seen"][0] if "seen" in item else torch.ones(shape, dtype=torch.bool)
    placement = pad_to_multiple(shape, tuple(stride))
    if version:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {index} {version}".encode()))
        for axis in config.flip_axes:
            if torch.rand((), generator=generator) < 0.5:
                image, mask = image.flip(axis + 1), mask.flip(axis) if mask is not None else None
                fov = fov.flip(axis)
        if config.rotate or config.scale or config.deform:
            spacing = item["affine"][:3, :3].norm(dim=0).tolist()
            image, mask, fov = deformed(image, mask, config, generator, spacing, order, None if fov.all() else fov)
            if background is not None and mask is not None:
                image = torch.where(mask == background, -1.0, image)
        if config.shift:
            low = [int(torch.randint(0, s, (), generator=generator)) for s in stride]
            sides = tuple(-(-(n + a) // s) * s for n, a, s in zip(shape, low, stride, strict=True))
            placement = pad_or_crop(shape, sides, offset=tuple(-a for a in low))
    padded = {
        "image": placement.apply(image, -1.0)[None],
        "fov": placement.apply(fov, False)[None, None],
    }
    if mask is not None:
        padded["mask"] = placement.apply(mask.to(torch.int16), PADDING)
    return padded


@torch.no_grad()
def build_latent_cache(
    dataset: VolumeDataset,
    vae: VolumeAutoencoder,
    folder: str | Path,
    config: LatentCacheConfig = AS_THEY_ARE,
    *,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> "LatentDataset":
    """Encode the volumes that are not in the cache yet, and return the data set of latents.

    Args:
        folder: the cache lives in `folder/<key>`; existing entries are kept, so an interrupted build resumes. At a URL
            (`LatentStore`), entries are copied to this machine when they are read.
        config: the versions of each volume; its `folder` is not read.
        seed: seed of the augmented versions.
        shard: (rank, world): with several processes each encodes its share; wait for all of them before reading.
    """
    key, folder = cache_key(dataset, vae, config, seed), plain_path(str(folder))
    store = LatentStore(f"{folder.rstrip('/')}/{key}") if is_url(folder) else None
    target = store.copies if store else Path(folder) / key
    if target.is_symlink():
        raise ValueError(f"{target}: is a link; remove it, or set cache.folder to the folder that it leads to")
    remove_leftovers(target)
    files = [[target / f"{i:05d}_{v:02d}.safetensors" for v in range(config.versions)] for i in range(len(dataset))]
    reader = EntryReader()
    share = range(len(dataset))[shard[0] :: shard[1]]
    missing = []
    for index in LiveBar(share, desc="check latents", unit="volume", delay=2, disable=None if progress else True):
        there = [
            _is_there(file, reader, store) for file in files[index]
        ]  # all of them, so that each damaged one is named
        missing += [] if all(there) else [index]
    order = 0 if dataset.config.image_labels else 3  # a label is there or not
    empty = background_index(dataset.labels) if dataset.config.empty_background else None
    quiet = None if progress and missing else True
    for index in LiveBar(missing, desc="encode latents", unit="volume", disable=quiet):
        item = dataset[index]
        for version, file in enumerate(files[index]):
            padded = _version(item, vae.stride, config, seed, index, version, order, empty)
            posterior = vae.encode(padded["image"].to(vae.device, vae.dtype), return_dict=False)[0]
            check_latents(posterior, _described(dataset, index, version))
            certain = not bool(posterior.std.any())
            entry = {
                "mean": posterior.mean[0],
                "std": posterior.std.new_zeros(1, 1, 1, 1) if certain else posterior.std[0],
                "inside": cells_inside(padded["fov"], posterior.mean.shape[2:])[0],
            }
            entry = {k: v.cpu().contiguous() for k, v in entry.items()} | (
                {"mask": padded["mask"]} if "mask" in padded else {}
            )
            room = store.room(sum(tensor.nbytes for tensor in entry.values())) if store else contextlib.nullcontext()
            try:
                # another run may be filling the same cache
                with room, atomic_file(file, store and store.mode) as unfinished:
                    write_entry(entry, unfinished, name=entry_name(file))
                    if store:
                        store.put(unfinished, file.name)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file}: the latent cache could not be written ({error}); make room on the disk, or set "
                    "cache.folder to another one. The same command keeps the existing entries and continues"
                ) from error
    conditions = [dataset.conditions(i) for i, versions in enumerate(files) for _ in versions]
    names = [_described(dataset, i, v) for i, versions in enumerate(files) for v in range(len(versions))]
    return LatentDataset([f for versions in files for f in versions], conditions, store, names=names, reader=reader)


def _described(dataset: VolumeDataset, index: int, version: int) -> str:
    return dataset.cases[index].name + (f" (version {version})" if version else "")


def entry_name(file: Path) -> str:
    """Return the name that an entry's digest covers: the cache's key and the entry."""
    return f"{file.parent.name}/{file.name}"


def _is_there(file: Path, reader: EntryReader, store: LatentStore | None) -> bool:
    """Return whether an entry exists already: a complete file, or an object in the store, whose local copy is checked
    when it is read.
    """
    if store:
        return file.name in store.known
    if not file.exists():
        return False
    try:
        reader.read(file, entry_name(file))
        return True
    except DamagedEntry as error:
        logger.warning("%s: a damaged entry of the latent cache (%s); made again", file, error)
        return False


class LatentDataset(Dataset):
    """Entries of a latent cache. Item i is {"mean", "std" (C, h, w, d), "inside" (1, h, w, d) boolean, "mask" (X, Y, Z)
    int16 if any, "name", and the "classes" and "numbers" of its case if any}.

    The tensors are views of the file in memory (safetensors maps it): only what is read is loaded, the system may drop
    it again, and a cache may be larger than memory. Missing files, and those whose copy is damaged, are copied from
    `store`. Each process checks an entry's digest once (`EntryReader`).

    Args:
        names: name of the volume of each entry, for messages.
    """

    def __init__(
        self,
        files: Sequence[Path],
        conditions: Sequence[dict[str, Tensor]] | None = None,
        store: LatentStore | None = None,
        *,
        names: Sequence[str] | None = None,
        reader: EntryReader | None = None,
    ):
        self.files, self.store = list(files), store
        self.names = [file.stem for file in self.files] if names is None else list(names)
        self.reader = EntryReader() if reader is None else reader
        self.conditions = [{}] * len(self.files) if conditions is None else list(conditions)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        """Read an entry. Raises: ValueError for a damaged entry, naming it and its volume."""
        file = self.files[index]
        if self.store and not file.exists():
            self.store.fetch(file)
        try:
            entry = self._read(file)
        except DamagedEntry as error:
            raise ValueError(
                f"{file}: a damaged entry of the latent cache, of {self.names[index]} ({error}); continue with "
                "--resume latest, which makes it again"
            ) from error
        entry["std"] = entry["std"].expand_as(entry["mean"])
        return {**entry, "name": file.stem, **self.conditions[index]}

    def _read(self, file: Path) -> dict[str, Tensor]:
        if self.store:
            touch(file)
        try:
            return self.reader.read(file, entry_name(file))
        except DamagedEntry as error:
            if not self.store:
                raise
            if file.exists():  # else it was removed just now, because the cache is full
                logger.warning("%s: a damaged copy of the latent cache (%s); copied again", file, error)
            self.store.fetch(file)
        try:
            return self.reader.read(file, entry_name(file))
        except DamagedEntry as error:  # it was written damaged, or swapped with another
            file.unlink(missing_ok=True)
            raise self.store.damaged(file.name, str(error)) from error


class LatentBatch(TypedDict):
    """A batch of latents: `mean` and `std` (B, C, h, w, d), `weight` (B, 1, h, w, d), and the conditions of each."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    conditions: Conditions


def collate_latents(
    items: Sequence[dict],
    stride: Sequence[int],
    num_labels: int,
    images: Mapping[str, slice] | None = None,
    *,
    partial: bool = False,
) -> LatentBatch:
    """Batch entries of any shapes, each cropped or padded at a random position to the shape of the first.

    Volumes have their own shapes; a batch needs one. The shape changes from batch to batch, so the model sees whole
    volumes, parts and borders. The position comes from a hash of the batch's names, so a resumed run sees the same
    batches. Padding has zero latents, no labels and no weight.

    Args:
        images: for each image condition, the channels of its latents.
        partial: whether masks may hold `UNKNOWN`.
    Returns: "mean", "std" (B, C, h, w, d), "weight" (B, 1, h, w, d), and "conditions", a `Conditions` with folded masks
    unless `num_labels` is 0, classes and numbers if entries have them, and all of `images`, if there are any.
    Raises: ValueError if labels are wanted and an entry has no mask.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(" ".join(item["name"] for item in items).encode()))
    shape = tuple(items[0]["mean"].shape[1:])
    rows: dict[str, list[Tensor]] = {"mean": [], "std": [], "weight": [], "mask": []}
    for item in items:
        size = tuple(item["mean"].shape[1:])
        room = [s - n for n, s in zip(size, shape, strict=True)]
        start = tuple(-int(torch.randint(min(r, 0), max(r, 0) + 1, (), generator=generator)) for r in room)
        cells = pad_or_crop(size, shape, offset=start)
        for key, values in (("mean", item["mean"]), ("std", item["std"]), ("weight", item["inside"].float())):
            rows[key].append(cells.apply(values, 0))
        if num_labels:
            if "mask" not in item:
                raise ValueError(f"latent cache entry {item['name']}: no mask, but the model is conditioned on one")
            in_voxels = (tuple(n * s for n, s in zip(axes, stride, strict=True)) for axes in (size, shape, start))
            rows["mask"].append(Placement(*in_voxels).apply(item["mask"], PADDING))  # pyright: ignore[reportArgumentType]
    batch = {key: torch.stack(rows[key]) for key in ("mean", "std", "weight")}
    columns = {key: torch.stack([item[key] for item in items]) for key in ("classes", "numbers") if key in items[0]}
    conditions = Conditions(
        **columns,
        mask=(
            fold_mask(torch.stack(rows["mask"]), as_stride(stride), num_labels, partial=partial) if num_labels else None
        ),
        image=image_condition(batch["mean"], images, batch["weight"]) if images else None,
    )
    return {"mean": batch["mean"], "std": batch["std"], "weight": batch["weight"], "conditions": conditions}
