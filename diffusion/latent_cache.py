"""Latents of a whole data set on disk: mean and standard deviation of each volume's posterior, so that training draws
z anew each time.

One safetensors file an entry, in a folder named by a hash of the autoencoder, the data and the augmentation: a stale
cache is never read, another one is built beside it. Latents (C, h, w, d); masks (X, Y, Z) int16 label indices, padded
to the stride with `PADDING`.
"""

import hashlib
import json
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from autoencoder import AutoencoderKL3D
from autoencoder.losses import cells_inside
from volumes import PADDING, VolumeDataset

from .folding import fold_mask

FORMAT = 1  # part of the key: raise it when entries are made differently


@dataclass(frozen=True)
class LatentAugmentation:
    """Extra versions of each volume, made before encoding because an autoencoder does not commute with flips and
    shifts.

    Args:
        versions: entries per volume; version 0 is always the volume as it is.
        flip_axes: axes along which the other versions are mirrored with probability 1/2 (0 is left-right).
        shift: whether the other versions are placed at a random offset below one stride, so that cells fall elsewhere.
        seed: of both.
    Raises: ValueError without a version, and for other axes than 0, 1 and 2.
    """

    versions: int = 1
    flip_axes: tuple[int, ...] = ()
    shift: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.versions < 1:
            raise ValueError(
                f"the latent cache needs at least one version of each volume, got versions {self.versions}"
            )
        if not set(self.flip_axes) <= {0, 1, 2}:
            raise ValueError(f"flip_axes of the latent cache are among 0, 1 and 2, got {tuple(self.flip_axes)}")


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file_stamp(path: Path | None) -> list[object]:
    if path is None or not path.exists():
        return [str(path)]
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def cache_key(dataset: VolumeDataset, vae: AutoencoderKL3D, augmentation: LatentAugmentation) -> str:
    """What the latents depend on, hashed: format, encoder and its config, preprocessing, files (name, size, time),
    augmentation. Another decoder makes no other latents."""
    config = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    cases = [[c.name, *(_file_stamp(p) for p in c.images.values()), _file_stamp(c.mask)] for c in dataset.cases]
    parts = [FORMAT, weights_hash(vae.encoder), config, asdict(dataset.config), cases, asdict(augmentation)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _version(
    item: dict, stride: Sequence[int], augmentation: LatentAugmentation, index: int, version: int
) -> dict[str, Tensor]:
    """One version of a volume, padded to multiples of the stride: image (1, C, X, Y, Z), fov (1, 1, X, Y, Z), mask
    (X, Y, Z) if there is one."""
    image, mask = item["image"], item.get("mask")
    shape = image.shape[1:]
    low = [(-n % s) // 2 for n, s in zip(shape, stride, strict=True)]
    if version:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{augmentation.seed} {index} {version}".encode()))
        for axis in augmentation.flip_axes:
            if torch.rand((), generator=generator) < 0.5:
                image, mask = image.flip(axis + 1), mask.flip(axis) if mask is not None else None
        if augmentation.shift:
            low = [int(torch.randint(0, s, (), generator=generator)) for s in stride]
    sides = [-(-(n + a) // s) * s for n, a, s in zip(shape, low, stride, strict=True)]
    window = tuple(slice(a, a + n) for a, n in zip(low, shape, strict=True))
    padded = {
        "image": image.new_full((1, len(image), *sides), -1.0),
        "fov": torch.zeros((1, 1, *sides), dtype=torch.bool),
    }
    padded["image"][(0, slice(None), *window)] = image
    padded["fov"][(0, 0, *window)] = True
    if mask is not None:
        padded["mask"] = torch.full(sides, PADDING, dtype=torch.int16)
        padded["mask"][window] = mask.to(torch.int16)
    return padded


@torch.no_grad()
def build_latent_cache(
    dataset: VolumeDataset,
    vae: AutoencoderKL3D,
    folder: str | Path,
    augmentation: LatentAugmentation = LatentAugmentation(),
    *,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> "LatentDataset":
    """Encode what is not yet in the cache and return the data set of latents.

    Args:
        folder: the cache lives in `folder/<key>`; entries already there are kept, so an interrupted build goes on.
        shard: (rank, world): with several processes each encodes its share; wait for all of them before reading.
    """
    target = Path(folder) / cache_key(dataset, vae, augmentation)
    target.mkdir(parents=True, exist_ok=True)
    files = [
        [target / f"{i:05d}_{v:02d}.safetensors" for v in range(augmentation.versions)] for i in range(len(dataset))
    ]
    missing = [i for i in range(len(dataset))[shard[0] :: shard[1]] if not all(f.exists() for f in files[i])]
    for index in tqdm(missing, desc="encode latents", disable=not progress or not missing):
        item = dataset[index]
        for version, file in enumerate(files[index]):
            padded = _version(item, vae.stride, augmentation, index, version)
            posterior = vae.encode(padded["image"].to(vae.device, vae.dtype), return_dict=False)[0]
            entry = {
                "mean": posterior.mean[0],
                "std": posterior.std[0],
                "inside": cells_inside(padded["fov"], posterior.mean.shape[2:])[0],
            }
            entry = {k: v.cpu().contiguous() for k, v in entry.items()} | (
                {"mask": padded["mask"]} if "mask" in padded else {}
            )
            partial = file.with_suffix(f".partial_{uuid.uuid4().hex}")  # another run may be filling the same cache
            save_file(entry, partial)
            partial.replace(file)
    return LatentDataset([f for versions in files for f in versions])


class LatentDataset(Dataset):
    """Entries of a latent cache: [i] -> {"mean", "std" (C, h, w, d), "inside" (1, h, w, d) boolean, "mask" (X, Y, Z)
    int16 if any, "name"}."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return {**load_file(self.files[index]), "name": self.files[index].stem}


def _place(values: Tensor, shape: Sequence[int], at: Sequence[int], fill: float = 0) -> Tensor:
    """Crop or pad the three axes before the last one's features of (h, w, d, F) to `shape`, shifted by `at` (negative
    crops)."""
    out = values.new_full((*shape, values.shape[-1]), fill)
    inner = [
        (max(a, 0), max(-a, 0), min(n + min(a, 0), s - max(a, 0)))
        for a, n, s in zip(at, values.shape, shape, strict=False)
    ]
    target = tuple(slice(to, to + length) for to, _, length in inner)
    source = tuple(slice(start, start + length) for _, start, length in inner)
    out[target] = values[source]
    return out


def collate_latents(items: Sequence[dict], stride: Sequence[int], num_labels: int) -> dict[str, Tensor | None]:
    """A batch of entries of any shapes, each cropped or padded to the shape of the first, at a random place.

    Volumes have their own shapes; a batch needs one. It is another one each time, so the model sees whole volumes,
    parts and borders. The place is drawn from a hash of the batch's names, so a resumed run sees the same batches.
    Padding has zero latents, no labels and no weight.

    Returns: "mean", "std" (B, C, h, w, d), "mask" folded ids (B, h, w, d, r) or None if `num_labels` is 0, "weight"
    (B, 1, h, w, d).
    Raises: ValueError if labels are wanted and an entry has no mask.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(" ".join(item["name"] for item in items).encode()))
    shape = items[0]["mean"].shape[1:]
    rows: dict[str, list[Tensor]] = {"mean": [], "std": [], "mask": [], "weight": []}
    for item in items:
        spans = [s - n for n, s in zip(item["mean"].shape[1:], shape, strict=True)]
        at = [int(torch.randint(min(span, 0), max(span, 0) + 1, (), generator=generator)) for span in spans]
        for key, values in (("mean", item["mean"]), ("std", item["std"]), ("weight", item["inside"].float())):
            rows[key].append(_place(values.movedim(0, -1), shape, at).movedim(-1, 0))
        if num_labels:
            if "mask" not in item:
                raise ValueError(f"latent cache entry {item['name']}: no mask, but the model is conditioned on one")
            ids = fold_mask(item["mask"][None], tuple(stride), num_labels)[0]  # pyright: ignore[reportArgumentType]
            rows["mask"].append(_place(ids, shape, at))
    return {key: torch.stack(values) if values else None for key, values in rows.items()}
