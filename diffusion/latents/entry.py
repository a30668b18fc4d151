"""One entry of a latent cache on disk: tensors in safetensors, with a digest of its name and of them in the header.

The digest detects an entry that is truncated, zeroed or has flipped bits, and one with the content of another. It is
compared when a process first opens the file, and again only if the file has changed since.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoencoder import LatentDistribution

DIGEST = "sha256"  # in the header
NEEDED = ("mean", "std", "inside")


class DamagedEntry(ValueError):
    """An entry whose content differs from the one written under its name."""


def entry_digest(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 over an entry's name, and the names, dtypes, shapes and bytes of its tensors."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_entry(tensors: dict[str, Tensor], path: Path, *, name: str) -> None:
    """Write tensors on the CPU to `path`, to be read under `name`."""
    save_file(tensors, path, metadata={DIGEST: entry_digest(name, tensors)})


def check_latents(posterior: LatentDistribution, volume: str) -> None:
    """Raise ValueError naming the volume if its latents are not finite."""
    if not bool(posterior.mean.isfinite().all() and posterior.std.isfinite().all()):
        raise ValueError(
            f"{volume}: its latents are not finite. The autoencoder is not trained well, or overflows in its "
            "precision; look at its reconstruction (python evaluate.py reconstruction), or exclude the volume"
        )


class EntryReader:
    """Reads entries, and remembers which of them this process has checked; processes that are forked from it inherit
    that."""

    def __init__(self) -> None:
        self.checked: dict[Path, tuple[int, ...]] = {}

    def read(self, path: Path, name: str) -> dict[str, Tensor]:
        """Read the tensors of an entry that was written under `name`. Raises: DamagedEntry if the file is anything
        else.
        """
        try:
            stamp = _stamp(path)
            with safe_open(path, framework="pt") as file:
                written = (file.metadata() or {}).get(DIGEST)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DamagedEntry(f"it cannot be read: {error}") from error
        if self.checked.get(path) != stamp:
            if written is None:
                raise DamagedEntry("it has no digest")
            if written != entry_digest(name, tensors):
                raise DamagedEntry("its content differs from the one written under its name")
            if not all(key in tensors for key in NEEDED):
                raise DamagedEntry(f"it holds {sorted(tensors)}")
            if not all(tensors[key].isfinite().all() for key in ("mean", "std")):
                raise DamagedEntry("its latents are not finite")
            self.checked[path] = stamp
        return tensors


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a value that changes with the file. Raises: OSError unless it is a regular file: a pipe would block."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
