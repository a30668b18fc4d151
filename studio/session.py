"""One browser's session: its masks, images and results, in a folder that goes with it."""

import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files.names import same_name
from pipelines.inputs.masks import MaskLike, model_values
from pipelines.inputs.request import VolumeRequest
from pipelines.storage.provenance import channel_files, sidecar_path
from pipelines.storage.record import GenerationRecord
from volumes import Volume, read_volume, volume_parts, volume_stem, write_volume

from .labels import drawing
from .models import StudioModel

IDLE_HOURS = 12  # after which a session ends
SERIES = "series"  # the folder of an upload, which names a DICOM series
MOST_SESSIONS = 100


@dataclass(frozen=True)
class StudioMask:
    """A mask of a session.

    Attributes:
        root: the name without the number of its version.
        file: what the pipeline reads: a file as the user gave it, or as it was painted; a folder for DICOM.
        grid: its grid in RAS+ order, and the one that it is stored on, without voxels.
    """

    id: str
    name: str
    root: str
    file: Path
    grid: Volume

    def to_json(self) -> dict[str, object]:
        """Return what the page needs to know of it."""
        return {"id": self.id, "name": self.name, **grid_json(self.grid)}


@dataclass(frozen=True)
class StudioImage:
    """An image that a user uploaded: to paint on, or as a condition."""

    id: str
    name: str
    file: Path
    grid: Volume

    def to_json(self) -> dict[str, object]:
        """Return what the page needs to know of it."""
        return {"id": self.id, "name": self.name, **grid_json(self.grid)}


@dataclass
class StudioResult:
    """A generated volume.

    Attributes:
        number: in the session, from 1.
        model: the name of the pipeline that generated it.
        path: of the volume, see `provenance.channel_files`.
        grid: as that of `StudioMask`.
        seed: that the user gave, of which `record.seed` was computed.
        accepted: whether it is in the collection.
    """

    id: str
    number: int
    model: str
    path: Path
    grid: Volume
    request: VolumeRequest
    record: GenerationRecord
    seed: int
    mask: str | None
    seconds: float
    warnings: list[str]
    maps: bool
    accepted: bool = False

    @property
    def files(self) -> list[Path]:
        """The files that hold the volume."""
        return channel_files(self.path, self.record.channels)

    def to_json(self) -> dict[str, object]:
        """Return what the page needs to know of it."""
        return {
            "id": self.id,
            "number": self.number,
            "model": self.model,
            "name": sidecar_path(self.path).stem,
            "mask": self.mask,
            "seed": self.seed,
            "steps": self.record.num_inference_steps,
            "guidance": self.record.guidance_scale,
            "classes": self.record.classes or {},
            "numbers": self.record.numbers or {},
            "channels": list(self.record.channels or []),
            "edited": self.record.edit is not None,
            "seconds": round(self.seconds, 2),
            "warnings": self.warnings,
            "maps": self.maps,
            "accepted": self.accepted,
            **grid_json(self.grid),
        }


@dataclass
class Session:
    """What one browser has. `lock` is held while it changes.

    Attributes:
        id: the secret in the browser's cookie.
        used: bytes of its uploads.
    """

    id: str
    folder: Path
    masks: dict[str, StudioMask] = field(default_factory=dict)
    images: dict[str, StudioImage] = field(default_factory=dict)
    results: dict[str, StudioResult] = field(default_factory=dict)
    used: int = 0
    last: float = field(default_factory=time.monotonic)
    lock: threading.RLock = field(default_factory=threading.RLock)
    count: int = 0

    def next_id(self) -> str:
        """Return a name that no other thing of the session has."""
        with self.lock:
            self.count += 1
            return str(self.count)

    def new_folder(self, kind: str) -> Path:
        """Make and return a folder of its own for a new file."""
        folder = self.folder / kind / self.next_id() / SERIES
        folder.mkdir(parents=True)
        return folder

    def free_name(self, root: str) -> str:
        """Return `root` or its next version that no mask of the session is called: root, root_v2, root_v3, ..."""
        taken = {same_name(mask.name) for mask in self.masks.values()}
        names = [root, *(f"{root}_v{number}" for number in range(2, len(taken) + 3))]
        return next(name for name in names if same_name(name) not in taken)

    def add_mask(self, file: Path, model: StudioModel) -> StudioMask:
        """Read a mask, check it for the model, and add it. Raises: ValueError for one that cannot be used."""
        values = model_mask(file, model)
        model.codes.encode(values.array[0])
        with self.lock:
            root = volume_stem(file)
            name = self.free_name(root)
            if name != root:  # of a second file of one name, which is renamed: volumes are called after their mask
                if len(volume_parts(file)) > 1 and not file.is_dir():
                    raise ValueError(f"{file.name}: the session has a mask of this name; rename both files")
                file = file.rename(file.with_name(f"{name}{file.name[len(root) :]}"))
            return self._keep(name, root, file, values)

    def example(self, file: Path, model: StudioModel) -> StudioMask:
        """Return an example of the pipeline as a mask of the session. Errors as `add_mask`."""
        with self.lock:
            known = next((mask for mask in self.masks.values() if mask.file == file), None)
            if known is None and self.free_name(volume_stem(file)) != volume_stem(file):
                # `add_mask` would rename the file, which is not the session's
                raise ValueError(f"{file.name}: the session has a mask of this name; open yours under another name")
            return known or self.add_mask(file, model)

    def add_empty(self, grid: Volume, root: str, model: StudioModel) -> StudioMask:
        """Add a mask of background on a grid; what is painted on it is called `root`."""
        with self.lock:
            name = self.free_name("empty")
            file = self.new_folder("masks") / f"{name}.nii.gz"
            empty = grid.replace(np.full((1, *grid.shape), model.codes.values[0], np.int16))
            write_volume(empty, file)
            return self._keep(name, root, file, empty)

    def paint(self, grid: Volume, root: str, data: bytes, model: StudioModel, known: StudioMask | None) -> StudioMask:
        """Write a painted mask, on the grid and in the orientation that `grid` was stored in, and add it.

        Args:
            data: of the drawing, see `LabelCodes.decode`.
            known: the mask that was painted on; it is returned if nothing changed.
        """
        values = model.codes.decode(data, grid.shape)
        if known is not None and np.array_equal(values, model_mask(known.file, model).array[0]):
            return known
        with self.lock:
            name = self.free_name(root)
            file = self.new_folder("masks") / f"{name}.nii.gz"
            write_volume(grid.replace(values[None]), file)
            return self._keep(name, root, file, grid)

    def _keep(self, name: str, root: str, file: Path, grid: Volume) -> StudioMask:
        mask = StudioMask(self.next_id(), name, root, file, without_voxels(grid))
        self.masks[mask.id] = mask
        return mask

    def add_image(self, file: Path, model: StudioModel) -> StudioImage:
        """Read an image and add it. Raises: ValueError for one that cannot be read."""
        volume = read_volume(file, **model.data.reading)
        with self.lock:
            image = StudioImage(self.next_id(), volume_stem(file), file, without_voxels(volume))
            self.images[image.id] = image
            return image

    def shown(self, text: str) -> str:
        """Return a message without the folders of this session, which mean nothing to its user."""
        inside = rf"{re.escape(str(self.folder))}/\w+/\d+/{SERIES}/"  # see `new_folder`
        return re.sub(inside, "", text).replace(str(self.folder), "the session")


@dataclass
class Sessions:
    """The sessions of a server, below one folder."""

    folder: Path
    open: dict[str, Session] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> Session:
        """Begin a session. Ends those that were idle for long. Raises: ValueError if there are too many."""
        self.end_idle()
        with self.lock:
            if len(self.open) >= MOST_SESSIONS:
                raise ValueError(f"{MOST_SESSIONS} sessions are open; end one of them, or start the studio again")
            key = secrets.token_urlsafe(32)
            folder = self.folder / secrets.token_hex(8)
            folder.mkdir(mode=0o700)
            self.open[key] = Session(key, folder)
            return self.open[key]

    def find(self, key: str | None) -> Session | None:
        """Return the session of a cookie, and note that it is in use; None for an unknown one."""
        session = self.open.get(key or "")
        if session is not None:
            session.last = time.monotonic()
        return session

    def end(self, session: Session) -> None:
        """End a session, and remove its files."""
        with self.lock:
            self.open.pop(session.id, None)
        shutil.rmtree(session.folder, ignore_errors=True)

    def end_idle(self, hours: float = IDLE_HOURS) -> None:
        """End the sessions that nobody used for so long."""
        now = time.monotonic()
        for session in [one for one in self.open.values() if now - one.last > hours * 3600]:
            self.end(session)


def model_mask(mask: MaskLike, model: StudioModel) -> Volume:
    """Read a mask in the label values of a model, in RAS+ order. Raises: ValueError for one that it does not take."""
    data = model.data
    return model_values(mask, data.labels, None, np.array(data.affine, dtype=np.float64), data.reading)


def mask_drawing(mask: StudioMask, model: StudioModel) -> bytes:
    """Return a mask as the bytes of a drawing."""
    return drawing(model.codes.encode(model_mask(mask.file, model).array[0]))


def without_voxels(volume: Volume) -> Volume:
    """Return the grid of a volume, with voxels that take no memory."""
    return volume.replace(np.broadcast_to(np.int16(0), (1, *volume.shape)))


def grid_json(grid: Volume) -> Mapping[str, object]:
    """Return a grid for the page."""
    return {
        "shape": list(grid.shape),
        "spacing": [round(side, 6) for side in grid.spacing],
        "affine": np.round(grid.affine, 6).tolist(),
    }
