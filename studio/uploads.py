"""What users send: each upload in a folder of its own, limited in size, and read by the package's own readers alone."""

import shutil
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

from files.paths import check_name

HEADERS = (".nhdr", ".mhd", ".hdr")  # of volumes in two files
MOST_FILES = 5000  # of one upload: the slices of a series
COPY_BYTES = 1 << 20


class TooLarge(ValueError):
    """An upload above the limit."""


async def receive(body: AsyncIterator[bytes], most: int) -> bytes:
    """Return the body of a request. Raises: TooLarge if it has more than `most` bytes."""
    pieces, size = [], 0
    async for piece in body:
        size += len(piece)
        if size > most:
            raise TooLarge(f"the request holds more than {most} bytes")
        pieces.append(piece)
    return b"".join(pieces)


async def receive_file(body: AsyncIterator[bytes], folder: Path, name: str, most: int) -> Path:
    """Write the body of a request to a file of this name in `folder`.

    Args:
        most: bytes.
    Raises: ValueError for a name that is not a plain file name, and for a file that is there. TooLarge above `most`
    bytes; nothing is left of the file then.
    """
    path = folder / plain_name(name)
    if path.exists():
        raise ValueError(f"{path.name}: two files of this name")
    size = 0
    try:
        with path.open("xb") as file:
            async for piece in body:
                size += len(piece)
                if size > most:
                    raise TooLarge(
                        f"{path.name}: larger than the {most >> 20} MiB that are left for uploads "
                        "(medvolume studio --upload_mb)"
                    )
                file.write(piece)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def plain_name(name: str) -> str:
    """Return the name of an uploaded file without folders. Raises: ValueError for one that is unfit for a file."""
    last = PurePosixPath(name.replace("\\", "/")).name
    if last.startswith("."):
        raise ValueError(f"{last[:40]!r}: a hidden file; rename it")
    return check_name(last, "an uploaded file")


def uploaded_volume(folder: Path, most: int) -> Path:
    """Return what of an upload a reader is given: its file, the header of two files, or the folder of a DICOM series.

    A single zip is unpacked first.

    Args:
        most: bytes that a zip may hold.
    Raises: ValueError for an empty upload, and as `unpack`.
    """
    files = sorted(folder.iterdir())
    if len(files) == 1 and files[0].suffix.lower() == ".zip":
        series = folder / plain_name(files[0].stem or "series")
        unpack(files[0], series, most)
        files[0].unlink()
        folder, files = series, sorted(series.iterdir())
    if not files:
        raise ValueError("the upload holds no file")
    if len(files) == 1:
        return files[0]
    headers = [file for file in files if file.suffix.lower() in HEADERS]
    if len(headers) == 1 and len(files) == 2:
        return headers[0]
    return folder


def unpack(archive: Path, folder: Path, most: int) -> None:
    """Unpack the regular files of a zip into one new folder, under names of our own where a name occurs twice.

    Raises: ValueError for anything but a zip, an encrypted one, and one of too many files. TooLarge for more than
    `most` bytes; what the archive says of its sizes is not trusted.
    """
    folder.mkdir()
    left = most
    try:
        with zipfile.ZipFile(archive) as packed:
            entries = [entry for entry in packed.infolist() if not entry.is_dir()]
            entries = [entry for entry in entries if not _is_hidden(entry.filename)]
            if len(entries) > MOST_FILES:
                raise ValueError(f"{archive.name}: holds {len(entries)} files; at most {MOST_FILES} are read")
            for number, entry in enumerate(entries):
                if entry.flag_bits & 1:
                    raise ValueError(f"{archive.name}: is encrypted; unpack it, and upload its files")
                name = plain_name(entry.filename)
                target = folder / (name if not (folder / name).exists() else f"{number:05d}_{name}")
                with packed.open(entry) as source, target.open("xb") as file:
                    while piece := source.read(COPY_BYTES):
                        left -= len(piece)
                        if left < 0:
                            raise TooLarge(f"{archive.name}: holds more than {most >> 20} MiB")
                        file.write(piece)
    except zipfile.BadZipFile as error:
        shutil.rmtree(folder)
        raise ValueError(f"{archive.name}: is not a zip archive, or a damaged one") from error
    except BaseException:
        shutil.rmtree(folder)
        raise


def _is_hidden(name: str) -> bool:
    """Return whether an entry is what systems leave beside files, such as .DS_Store and __MACOSX/."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return any((part.startswith(".") and part not in ("..", ".")) or part == "__MACOSX" for part in parts)
