"""Volumes of a data set with other voxels than their files have."""

from collections.abc import Callable, Iterator

from volumes import Volume, VolumeDataset
from volumes.intensity import LinearScale
from volumes.prepared.case import PreparedCase, UnscaledCase
from volumes.prepared.entry import facts_of, pack


def plant(dataset: VolumeDataset, index: int, change: Callable[[PreparedCase], object]) -> None:
    """Change a volume in place, image in [-1, 1], mask and affine; the data set then keeps it in memory."""
    old = dataset.load(index)
    scales = {"scales": (LinearScale(-1, 1),) * len(old.image.array)}
    image, mask = (one and Volume(one.array.copy(), one.affine.copy(), one.source) for one in (old.image, old.mask))
    case = UnscaledCase(**{**old.details(), **scales}, image=image, mask=mask, seen=old.seen)
    change(case)
    dataset.held[index] = pack(case)
    dataset.facts[index] = facts_of(case, dataset.held[index], dataset.config, dataset.num_labels)


def loaded(dataset: VolumeDataset) -> Iterator[PreparedCase]:
    """Each volume of a data set, whole."""
    return (dataset.load(index) for index in range(len(dataset)))
