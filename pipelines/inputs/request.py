"""Requests: what each volume is generated from."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from volumes import ForegroundCrop

from .arguments import grid_shape, grid_spacing, translation
from .images import ImageLike, Images
from .inpainting import EditRequest
from .masks import LabelMap, MaskLike, as_list, identity

Classes = Mapping[str, str | int]  # {class: value}
Numbers = Mapping[str, float]  # {number: value}
V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class VolumeRequest:
    """What one volume is generated from. Its arguments are those of a call of the pipeline, for one volume.

    Attributes:
        mask: label map; its grid is the volume's.
        shape: voxels (X, Y, Z), where neither a mask nor an image sets the grid.
        spacing: mm between them; None for that of the model's template.
        classes, numbers: conditions of the whole volume.
        images: {channel: image} of the channels that condition the others.
        label_map: label values of the mask that are read as others.
        edit: the image that is changed, for `MedVolumeEditPipeline`.
        box_image: image on the mask's grid whose foreground sets the box of `data.crop`, where no other image does. It
            conditions nothing.
        name: name of the volume's files, for `batch_generation`.
    Raises: ValueError for a shape, a spacing or a label map that cannot be used.
    """

    mask: MaskLike | None = None
    shape: Sequence[int] | None = None
    classes: Classes = field(default_factory=dict)
    numbers: Numbers = field(default_factory=dict)
    images: Images = field(default_factory=dict)
    label_map: LabelMap | None = None
    edit: EditRequest | None = None
    box_image: ImageLike | None = None
    name: str = "volume"
    spacing: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", None if self.shape is None else grid_shape(self.shape))
        object.__setattr__(self, "label_map", translation(self.label_map))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", grid_spacing(self.spacing))
            if self.shape is None:
                raise ValueError("spacing: is of a shape; masks and images have their own. Give shape, or omit spacing")

    @property
    def files(self) -> list[object]:
        """The mask and the images that are read: paths, or objects in memory."""
        masks: list[object] = [] if self.mask is None else [self.mask]
        edited = [] if self.edit is None else self.edit.files
        boxes = [] if self.box_image is None else [self.box_image]
        return [*masks, *self.images.values(), *edited, *boxes]

    @property
    def grid_key(self) -> Hashable:
        """A key that is equal for requests of the same files, which have the same grid."""
        images = sorted((str(channel), identity(image)) for channel, image in self.images.items())
        edit = None if self.edit is None else self.edit.identity
        label_map = tuple((self.label_map or {}).items())
        grid = self.shape, self.spacing
        return identity(self.mask), grid, tuple(images), label_map, edit, identity(self.box_image)

    def image_of_box(self, crop: ForegroundCrop | None) -> ImageLike | None:
        """The image whose foreground sets the box of a model's `data.crop`; None if there is none."""
        if crop is None or crop.channel is None:
            return None
        edited = {} if self.edit is None else self.edit.images
        return edited.get(crop.channel, self.images.get(crop.channel, self.box_image))


def call_requests(
    mask: MaskLike | Sequence[MaskLike] | None,
    shape: Sequence[int] | None,
    classes: Classes | Sequence[Classes] | None,
    numbers: Numbers | Sequence[Numbers] | None,
    images: Images | Sequence[Images] | None,
    label_map: LabelMap | None,
    box_image: ImageLike | Sequence[ImageLike] | None = None,
    spacing: Sequence[float] | None = None,
) -> list[VolumeRequest]:
    """Build one request per mask; without masks one per dict of a list, or a single one.

    Raises: ValueError for lists of another length than the masks, for entries that are not dicts, and for `box_image`
    without a mask.
    """
    masks = None if mask is None else as_list(mask)
    for conditions in (classes, numbers, images):
        several = conditions if isinstance(conditions, Sequence) else [{} if conditions is None else conditions]
        if not all(isinstance(of_volume, Mapping) for of_volume in several):
            raise ValueError(
                'classes, numbers and image are dicts such as {"sex": "F"}, {"age": 63} and {"ct": "ct.nii.gz"}, or '
                f"lists of one dict per mask; got {conditions!r:.200}"
            )
    lengths = [len(conditions) for conditions in (classes, numbers, images) if isinstance(conditions, Sequence)]
    if masks is not None:
        count = len(masks)
    else:
        count = lengths[0] if lengths else 1
    if not count or any(length != count for length in lengths):
        volumes = f"{count} masks" if masks is not None else "as many volumes"
        raise ValueError(f"classes, numbers and image: lists of {lengths} dicts for {volumes}; give one per mask")
    of_boxes = _box_images(box_image, None if masks is None else count)
    return [
        VolumeRequest(
            None if masks is None else masks[number],
            shape,
            _of_volume(classes, number),
            _of_volume(numbers, number),
            _of_volume(images, number),
            label_map,
            box_image=of_boxes[number] if of_boxes else None,
            spacing=spacing,
        )
        for number in range(count)
    ]


def _box_images(box_image: ImageLike | Sequence[ImageLike] | None, masks: int | None) -> Sequence[ImageLike]:
    """One image per mask; () without images. Raises: ValueError for another number, and without masks."""
    if box_image is None:
        return ()
    if masks is None:
        raise ValueError("box_image sets the box on a mask's grid: give a mask, or leave it out")
    images = as_list(box_image)
    images = images if isinstance(box_image, list | tuple) or len(images) > 1 else images * masks
    if len(images) != masks:
        raise ValueError(f"box_image: {len(images)} images for {masks} masks; give one per mask, or one for all")
    return images


def _of_volume(conditions: Mapping[str, V] | Sequence[Mapping[str, V]] | None, number: int) -> Mapping[str, V]:
    """Return the conditions of one volume of a call."""
    if conditions is None:
        return {}
    return conditions[number] if isinstance(conditions, Sequence) else conditions
