"""The `data:` section of a training config: the files of a data set, and how they are brought into a model's terms."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from cli.settings import (
    NonNegativeInt,
    PathBelowRoot,
    PositiveFloat,
    PositiveInt,
    Range,
    ShareBelowOne,
    UserPath,
    checked,
)
from files.names import nfc
from files.paths import check_name
from volumes.foreground import ForegroundCrop
from volumes.formats.raw import MaskReading, Reading
from volumes.intensity import IntensityScaling
from volumes.labels import segment_values
from volumes.volume import UNKNOWN

Label = Annotated[int, Range(-(2**15), 2**15 - 1)]  # masks are int16


@dataclass
@checked
class PhantomConfig:
    """Artificial volumes instead of files.

    Args:
        count: how many volumes, each its own subject.
        shape: voxels along X, Y and Z.
        seed: number of the first phantom.
        lesion_voxels: smallest and largest number of voxels of a lesion, such as [2, 6]. Default: lesions of about a
            fifth of the volume's side.
        lesions: lesions of each phantom, for `lesion_voxels`; fewer where the organ has no room for all.
    """

    count: PositiveInt = 32
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 32, 32)
    seed: NonNegativeInt = 0
    lesion_voxels: tuple[PositiveInt, PositiveInt] | None = None
    lesions: PositiveInt = 1

    def __post_init__(self) -> None:
        if self.lesion_voxels is not None and self.lesion_voxels[0] > self.lesion_voxels[1]:
            low, high = self.lesion_voxels
            raise ValueError(f"data: phantom.lesion_voxels [{low}, {high}] is smallest, then largest; swap them")
        if self.lesion_voxels is None and self.lesions != 1:
            raise ValueError(f"data: phantom.lesions {self.lesions} needs phantom.lesion_voxels, such as [2, 6]")


@dataclass
@checked
class DataConfig:
    """Files, subjects, splits, labels and preprocessing of one data set.

    Paths are patterns relative to `root`. `{column}` stands for a value of the table, or without a table for any
    piece of a file name, which then has a name; `*`, `?` and `**` match as usual. Images and masks belong together
    when the pieces agree.

    Args:
        root: folder that the patterns and the table are relative to, or its fsspec URL (s3://bucket/folder): see
            `files.remote`. Default: the folder of the file that holds this section, or the working directory.
        table: CSV file with a header, or JSON list of objects; one row a volume. Its columns ride along as metadata.
            Also a URL of its own.
        images: pattern of the image files (NIfTI, NRRD, MetaImage), or of folders that hold a DICOM series each; a list
            of patterns adds them up; {channel: pattern} makes several channels.
        masks: pattern of the label maps; of DICOM-SEG and RTSTRUCT files, or folders with one, too: see `label_map`.
        time_point: which volume of 4-D image files is taken, counted from 0: one number, or {channel: number}, with
            which one 4-D file can fill several channels.
        units: what lengths in the files' headers are in, where these say so wrongly: mm, cm, m or um. null believes
            them. A pipeline reads the masks and images of its calls in the same way.
        axes: CXYZ if channels come first in the NIfTI files, as (1, X, Y, Z); XYZC if they only look so and are
            refused.
        subject: column (or named piece of the file name) that says whose volume it is.
        group_by: regular expression searched in the case's name; the text that it (its first group) matches is the
            subject. With neither `subject` nor `group_by`, every volume is its own subject.
        split: column that holds "train", "validation" or "test".
        test_fraction: without `split`, the fraction of all subjects that is held out as the test split.
        validation_fraction: fraction of the training subjects held out for validation, unless `split` names some.
        split_seed: another number draws other subjects.
        label_map: label values of the files to label values of the model, before anything else, e.g. {3: 1}. Of
            DICOM-SEG and RTSTRUCT also the names of segments, e.g. {GTV_Mass: 1}: a segment is read that is called as
            a label, or whose name or number is here; others are left out. {255: -2} says that voxels of 255 may have
            any label: a model with `partial_masks` fills them in.
        label_names: every label value and its name, e.g. {0: background, 1: tumor}.
        image_labels: says that the image files are label maps: every value and its name, the lowest being the
            background. A model sees a channel for each other label, called by its name: 1 inside, -1 outside.
        resample_to: channel onto whose grid the other channels and the mask of a case are resampled when it is read,
            e.g. ct (`image` where images are one pattern): images linearly, masks by the nearest voxel. A case is then
            the box of that grid that all of them show; choose the channel that shows the least. A case is refused where
            they show less than a twentieth of it. null refuses cases whose volumes lie on different grids.
        crop: cuts each case to the box of what is not background, before it is resampled to `spacing`: {above: -500}
            (CT), {above: mask}. A pipeline finds the box in the same way, generates it, and writes the whole grid. null
            keeps whole volumes.
        empty_background: says that all channels have their lowest intensity wherever the mask is background (label 0),
            as in skull-stripped MR. It is checked. Generated volumes then have it there exactly: where the mask says
            so, and without a mask where the decoded intensity is below a threshold that training measures.
        spacing: voxel size in mm to which everything is resampled; null keeps each volume's own.
        intensity: scaling of intensities, one for all channels or a mapping {channel: scaling}.
        classes: columns that condition a model, each with the values it may have, e.g. {sex: [F, M], grade: ['1',
            '2']}, or with what its values are called, e.g. {sex: {F: female, W: female, M: male}}. A model, its
            records and `pipe(classes=...)` know the names alone. Cells may be empty. A class that a mirrored volume
            would belie, such as the body's side, forbids flip_axes.
        numbers: columns of numbers that condition a model, e.g. [age, weight]. Cells may be empty. spacing_x,
            spacing_y, spacing_z, size_x, size_y and size_z need no column: mm between voxels, and from end to end, of
            the volume.
        condition_channels: image channels that a model may be given, to generate the others from them, e.g. [ct, pet].
        on_error: "raise" stops at the first file that is refused; "skip" continues without it and lists it.
        phantom: draw volumes instead of reading files.
    """

    root: UserPath = "."
    table: PathBelowRoot | None = None
    images: PathBelowRoot | list[PathBelowRoot] | dict[str, PathBelowRoot] = field(default_factory=list)
    masks: PathBelowRoot | None = None
    time_point: NonNegativeInt | dict[str, NonNegativeInt] | None = None
    units: Literal["mm", "cm", "m", "um"] | None = None
    axes: Literal["XYZC", "CXYZ"] | None = None
    subject: str | None = None
    group_by: str | None = None
    split: str | None = None
    test_fraction: ShareBelowOne = 0.0
    validation_fraction: ShareBelowOne = 0.1
    split_seed: NonNegativeInt = 0
    label_map: dict[Label | str, Label] = field(default_factory=dict)
    label_names: dict[Label, str] = field(default_factory=dict)
    image_labels: dict[Label, str] = field(default_factory=dict)
    resample_to: str | None = None
    crop: ForegroundCrop | None = None
    empty_background: bool = False
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    intensity: IntensityScaling | dict[str, IntensityScaling] = field(default_factory=IntensityScaling)
    classes: dict[str, list[str] | dict[str, str]] = field(default_factory=dict)
    numbers: list[str] = field(default_factory=list)
    condition_channels: list[str] = field(default_factory=list)
    on_error: Literal["raise", "skip"] = "raise"
    phantom: PhantomConfig | None = None

    def __post_init__(self) -> None:
        self._compose()
        self._check_source()
        for channel in self.patterns if isinstance(self.images, dict) else ():
            check_name(channel, "data: images, for files of this channel")
        if self.split and self.test_fraction:
            raise ValueError("data: test_fraction has no effect when split names a column; remove one of them")
        if self.subject and self.group_by:
            raise ValueError("data: subject and group_by say the same thing twice; remove one of them")
        if self.group_by:
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise ValueError(f"data: group_by {self.group_by!r} is not a regular expression: {error}") from error
        named = {**self.label_names, **self.image_labels}
        lost = sorted(set(self.label_map.values()) - {*named, UNKNOWN}) if named else []
        if lost:
            raise ValueError(f"data: label_map leads to {lost}, which is not among the labels' names: {named}")
        try:
            segment_values(named, self.label_map)
        except ValueError as error:
            raise ValueError(f"data: {error}") from error
        self._check_image_labels()
        self._check_classes()
        if twice := sorted(set(self.classes) & set(self.numbers)):
            raise ValueError(f"data: {twice} are both classes and numbers; remove them from one")
        self._check_given()
        if self.resample_to is not None and self.resample_to not in self.patterns:
            raise ValueError(
                f"data: resample_to is {self.resample_to!r}, the image channels are {', '.join(self.patterns)}; name "
                "the one whose grid the others are resampled onto"
            )
        self._check_crop()
        self._check_background()
        if isinstance(self.intensity, dict) and set(self.intensity) != set(self.channels):
            raise ValueError(
                f"data: intensity names the channels {sorted(self.intensity)}, images has {sorted(self.channels)}"
            )
        if isinstance(self.time_point, dict) and not set(self.time_point) <= set(self.patterns):
            raise ValueError(
                f"data: time_point names the channels {sorted(self.time_point)}, images has {sorted(self.patterns)}"
            )

    def _check_source(self) -> None:
        """Raises: ValueError unless there are either files or phantoms."""
        if self.phantom is not None:
            given = [
                name
                for name in (
                    "images",
                    "image_labels",
                    "masks",
                    "table",
                    "units",
                    "axes",
                    "split",
                    "subject",
                    "group_by",
                    "resample_to",
                )
                if getattr(self, name)
            ]
            if given:
                raise ValueError(f"data: phantom takes the place of files; remove {', '.join(given)}")
        elif not self.images:
            raise ValueError("data: images is missing; give a pattern such as images/*.nii.gz, or a phantom section")

    def _compose(self) -> None:
        """Names of columns, values and channels in NFC, as tables are read."""
        for name in ("images", "intensity", "time_point"):
            if isinstance(found := getattr(self, name), dict):
                setattr(self, name, {nfc(channel): value for channel, value in found.items()})
        self.condition_channels = [nfc(name) for name in self.condition_channels]
        self.subject, self.split = (name and nfc(name) for name in (self.subject, self.split))
        self.resample_to = self.resample_to and nfc(self.resample_to)
        if self.crop is not None and self.crop.channel is not None:
            self.crop = replace(self.crop, channel=nfc(self.crop.channel))
        self.numbers = [nfc(name) for name in self.numbers]
        self.classes = {
            nfc(column): {nfc(value): nfc(name) for value, name in values.items()}
            if isinstance(values, dict)
            else [nfc(value) for value in values]
            for column, values in self.classes.items()
        }

    def _check_crop(self) -> None:
        crop = self.crop
        if crop is None:
            return
        if self.image_labels:
            raise ValueError("data: crop is for images with intensities, image_labels says that they are label maps")
        if crop.by_mask and not (self.masks or self.phantom):
            raise ValueError(
                "data: crop.above is mask, and there are no masks; set data.masks, or a value of the images"
            )
        if crop.channel is not None and crop.channel not in self.patterns:
            raise ValueError(
                f"data: crop.channel is {crop.channel!r}, the image channels are {', '.join(self.patterns)}"
            )

    def _check_background(self) -> None:
        if not self.empty_background:
            return
        if self.image_labels:
            raise ValueError("data: empty_background is for images with intensities, image_labels says otherwise")
        if not (self.masks or self.phantom):
            raise ValueError("data: empty_background needs masks, which say where the background is; set data.masks")
        if self.masks and self.label_names and 0 not in self.label_names:
            raise ValueError(
                f"data: empty_background needs the label 0, the background; label_names has {sorted(self.label_names)}"
            )

    def _check_classes(self) -> None:
        for column, values in self.classes.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"data: classes.{column} lists the values it may have, each once; got {values}")
            if not isinstance(values, dict):
                continue
            if "" in values or "" in values.values():
                raise ValueError(f"data: classes.{column} has an empty value or name; an empty cell is left empty")
            if moved := sorted(name for name in values.values() if values.get(name, name) != name):
                raise ValueError(
                    f"data: classes.{column} calls other values {moved[0]!r}, and {moved[0]!r} itself "
                    f"{values[moved[0]]!r}; choose a name that is not a value of the table"
                )

    def _check_image_labels(self) -> None:
        names = list(self.image_labels.values())
        hidden = [value for value, target in self.label_map.items() if target == UNKNOWN]
        if names and hidden and not self.masks and UNKNOWN not in self.image_labels:
            raise ValueError(
                f"data: label_map calls {hidden} unknown ({UNKNOWN}), which is for masks, and image_labels says that "
                "the images are label maps; map them to one of its labels"
            )
        if names and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError(f"data: image_labels names the background and one label or more, each once; got {names}")
        if names and isinstance(self.images, dict):
            raise ValueError(
                "data: image_labels are of one file a volume; give images as one pattern, without channels"
            )
        if names and self.intensity != IntensityScaling():
            raise ValueError("data: intensity has no effect on label maps; remove it, or image_labels")
        if names and self.time_point is not None:
            raise ValueError(f"data: time_point {self.time_point} is of 4-D images, label maps are 3-D; remove it")

    def _check_given(self) -> None:
        if unknown := sorted(set(self.condition_channels) - set(self.channels)):
            raise ValueError(f"data: condition_channels names {unknown}, the image channels are {self.channels}")
        if len(set(self.condition_channels)) < len(self.condition_channels):
            raise ValueError(f"data: condition_channels names a channel twice: {self.condition_channels}")
        if self.condition_channels and (len(self.channels) < 2 or self.image_labels):
            raise ValueError(
                "data: condition_channels needs images of several channels, {channel: pattern}, some of them generated"
            )

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Return what a model knows of each class: its values in the order of the list, or their names in alphabetical
        order.
        """
        return {
            column: sorted(set(values.values())) if isinstance(values, dict) else list(values)
            for column, values in self.classes.items()
        }

    @property
    def channels(self) -> list[str]:
        """Names of the channels, in the order of the model's input."""
        if self.image_labels:
            return [self.image_labels[value] for value in sorted(self.image_labels)[1:]]
        return list(self.images) if isinstance(self.images, dict) else ["image"]

    @property
    def patterns(self) -> dict[str, list[str]]:
        """File patterns by channel; those of label maps are of `image`, which holds all channels."""
        if isinstance(self.images, dict):
            return {channel: [pattern] for channel, pattern in self.images.items()}
        return {"image": [self.images] if isinstance(self.images, str) else list(self.images)}

    @property
    def reading(self) -> Reading:
        """How the headers of all files are read, as keywords of `read_volume` and `read_mask`; empty if they are
        right."""
        reading: Reading = {}
        if self.units is not None:
            reading["units"] = self.units
        if self.axes is not None:
            reading["axes"] = self.axes
        return reading

    @property
    def mask_reading(self) -> MaskReading:
        """Return how label maps are read, as keywords of `read_mask`."""
        named = {**self.label_names, **self.image_labels}
        return {**self.reading, "names": segment_values(named, self.label_map)}

    def volume_number(self, channel: str) -> int | None:
        """Which volume of this channel's 4-D files is taken; None where they are 3-D."""
        return self.time_point.get(channel) if isinstance(self.time_point, dict) else self.time_point

    def scaling(self, channel: str) -> IntensityScaling:
        """How this channel is scaled."""
        if self.image_labels:
            return IntensityScaling("window", 0, 1)
        return self.intensity[channel] if isinstance(self.intensity, dict) else self.intensity
