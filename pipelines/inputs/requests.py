"""What volumes are asked for: a mask each, or a row of a table with masks, classes, numbers and images."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from files.names import (
    Disk,
    cell_path,
    glob_names,
    resource_forks,
    same_name,
    windows_hint,
)
from files.paths import check_name
from files.remote import (
    copy_pattern,
    copy_table,
    is_url,
    plain_path,
    with_urls,
)
from pipelines.pipeline import MedVolumePipeline
from volumes import volume_stem
from volumes.data.tables import read_table
from volumes.formats.dicom import is_series
from volumes.formats.read import SUFFIXES, is_volume

FOLDER_SUFFIXES = tuple(suffix for suffix in SUFFIXES if not suffix.startswith(".img"))  # of a pair, the .hdr


@dataclass(frozen=True)
class Request:
    """What to make volumes of: a name, a mask (None where there is none), the classes and numbers asked for, and the images
    given."""

    name: str
    mask: Path | None
    classes: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Those that are read."""
        return [*([self.mask] if self.mask else []), *self.images.values()]


def mask_requests(patterns: Sequence[str], output: Path) -> list[Request]:
    """One of each mask: `find_masks`."""
    return [Request(volume_stem(mask), mask) for mask in find_masks(patterns, output)]


def find_masks(patterns: Sequence[str], output: Path) -> list[Path]:
    """Mask files in folders, or matching patterns, sorted by stem; of URLs, local copies.

    Raises: ValueError if there are none, if two have the same stem (their volumes would have one name), or if masks lie
    in the output folder (volumes would become masks in the next run).
    """
    found: set[Path] = set()
    disk = Disk()
    for given in patterns:
        pattern = copy_pattern(given) if is_url(given) else plain_path(given)
        spelled = str(disk.find(pattern))
        pattern = spelled if Path(spelled).exists() else pattern
        matches = [pattern] if Path(pattern).is_file() else glob_names(pattern)  # a[1].nii is a file's name
        paths = [path for path in map(Path, matches) if is_volume(path)]
        if Path(pattern).is_dir() and not paths:  # a folder of masks, not of one's slices
            paths = [
                path
                for path in Path(pattern).iterdir()
                if path.name.lower().endswith(FOLDER_SUFFIXES) or is_series(path)
            ]
        found |= {path for path in paths if not path.name.startswith(".")}
    if not found:
        raise ValueError(
            f"no masks found in {' '.join(patterns)}; give a folder with .nii.gz files (or other volumes), or a quoted glob"
        )
    masks = sorted(found, key=lambda path: (volume_stem(path), str(path)))
    if forks := resource_forks(masks):
        warnings.warn(f"{len(forks)} files of macOS beside the masks are passed over, such as {forks[0]}", stacklevel=2)
    for mask in masks:
        check_name(volume_stem(mask), f"the mask {str(mask)!r}, for its volumes")
    for first, second in itertools.pairwise(sorted(masks, key=lambda path: same_name(volume_stem(path)))):
        if same_name(volume_stem(first)) == same_name(volume_stem(second)):
            both = with_urls(f"{first} and {second}")
            alike = "" if volume_stem(first) == volume_stem(second) else ", but for upper and lower case"
            raise ValueError(f"{both} have the same stem{alike}, so their volumes would too; rename one")
    refuse_masks_in(output, masks)
    return masks


def refuse_masks_in(output: Path, masks: Sequence[Path]) -> None:
    """Raises: ValueError for a mask, or an image, in the output folder."""
    for mask in masks:
        if mask.parent.resolve() == output.resolve():
            raise ValueError(f"{mask}: lies in --output {output}; write volumes to another folder")


def read_requests(source: str | Path, pipe: MedVolumePipeline, output: Path) -> list[Request]:
    """The rows of a table of conditions, in order. Of a table at a URL, local copies of the files below its folder.

    Raises: ValueError for columns that the model does not know, for names used twice or unfit for a file, for masks and
    images in the output folder, and if some rows have a mask (or, without any, an image) and others none.
    """
    disk = Disk()
    table = copy_table(source, read_table) if is_url(source) else disk.find(plain_path(str(source)))
    schema, rows = pipe.unet.condition_schema, read_table(table)
    channels = [name for name, _ in schema.images]
    known = ["mask", "name", *schema.classes, *schema.numbers, *channels]
    if unknown := sorted({column for row in rows for column in row} - set(known)):
        raise ValueError(f"{source}: unknown columns {unknown}; for this model a table has {', '.join(known)}")
    requests: list[Request] = []
    called: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        given = {column: value for column, value in row.items() if value != ""}
        paths = {}
        for column in [name for name in ("mask", *channels) if name in given]:
            cell = str(given[column])
            paths[column] = cell_path(table.parent, cell, disk)
            if not paths[column].exists():
                raise ValueError(
                    f"{source}: {row.place}: {with_urls(str(paths[column]))}: no such file{windows_hint(cell)}"
                )
        mask = paths.pop("mask", None)
        name = str(given.get("name", volume_stem(mask) if mask else f"row_{number:04d}"))
        check_name(name, f"{source}: {row.place}, for its volumes")
        if other := called.get(same_name(name)):
            raise ValueError(
                f"{source}: several rows are called {name}: {other} and {row.place}"
                " (upper and lower case are one on some disks); tell them apart in a column `name`"
            )
        called[same_name(name)] = row.place
        classes, numbers = (
            {column: given[column] for column in kind if column in given} for kind in (schema.classes, schema.numbers)
        )
        requests.append(Request(name, mask, classes, numbers, paths))
    masks, files = sum(bool(request.mask) for request in requests), sum(bool(request.files) for request in requests)
    if (masks or files) not in (0, len(requests)):
        what = "a mask" if masks else "an image"
        raise ValueError(f"{source}: {masks or files} of {len(requests)} rows have {what}; split it into two tables")
    refuse_masks_in(output, [path for request in requests for path in request.files])
    return requests
