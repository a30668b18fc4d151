"""Compare the content of a file of voxels, by its first bytes, with its name."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

from files.paths import open_regular
from volumes.volume import VolumeError

POINTER = b"version https://git-lfs"
RESOURCE_FORK = b"\x00\x05\x16\x07"  # AppleDouble, what macOS writes beside files on disks of others
GZIP = b"\x1f\x8b"
WEB_PAGE = re.compile(rb"\s*(?:<!doctype\b|<html\b|<head\b|<\?xml\b)", re.IGNORECASE)
ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}
START_BYTES = 352  # a NIfTI header, and where its voxels begin
SUFFIXES = {
    "NIfTI": (".nii", ".hdr", ".img"),
    "NRRD": (".nrrd", ".nhdr"),
    "MetaImage": (".mha", ".mhd"),
    "DICOM": (".dcm",),
}


def check_content(path: Path) -> None:
    """Raise VolumeError for a file that is empty, a Git LFS pointer or a resource fork of macOS, and if the name does
    not fit the content: a .gz file that is not gzip, a gzip file without .gz, or another format than its suffix says.
    The error names the right suffix.
    """
    with open_regular(path) as file:
        start = file.read(START_BYTES)
    if not start:
        raise VolumeError(f"{path}: is empty")
    if start.startswith(POINTER):
        raise VolumeError(f"{path}: is a Git LFS pointer, not the volume itself; fetch it with `git lfs pull`")
    if start.startswith(RESOURCE_FORK):
        raise VolumeError(
            f"{path}: is a resource fork that macOS left beside a file; give {path.name.removeprefix('._')}"
        )
    if WEB_PAGE.match(start):
        raise VolumeError(
            f"{path}: is a web page by its content, not a volume; fetch the file itself, perhaps with a login"
        )
    stem, zipped = re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE), path.name.lower().endswith(".gz")
    expected = stem.lower().endswith(tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))
    archive = next((what for mark, what in ARCHIVES.items() if start.startswith(mark)), None)
    if archive and expected and not stem.lower().endswith(".img"):
        raise VolumeError(f"{path}: is {archive} by its content; unpack it, and give the volume inside")
    if zipped and not start.startswith(GZIP):
        named = content_kind(start)
        rename = (
            ""
            if named is None and stem.lower().endswith((".nii", ".hdr"))
            else f"rename it to {_renamed(stem, named)}, or "
        )
        raise VolumeError(
            f"{path}: is not gzip, though its name ends in .gz{f' ({named} by its content)' if named else ''}; "
            f"{rename}fetch it again"
        )
    if start.startswith(GZIP) and stem.lower().endswith(SUFFIXES["NIfTI"][2]) and not zipped:
        return  # of voxels only, which may begin with anything
    if start.startswith(GZIP):
        start = _unpacked(path)
        named = content_kind(start)
        if start.startswith(GZIP):
            raise VolumeError(f"{path}: is gzip within gzip; unpack it once (gunzip)")
        if named is None and not expected:
            return  # of an unknown kind, such as .mgz, which its reader reports
        if not stem.lower().endswith(SUFFIXES["NIfTI"]) and named != "NIfTI":
            raise VolumeError(
                f"{path}: is gzip by its content; unpack it (gunzip), the format compresses its voxels itself"
            )
        if not zipped:
            raise VolumeError(
                f"{path}: is gzip by its content, though its name does not end in .gz; rename it to "
                f"{_renamed(stem, named)}.gz"
            )
    named = content_kind(start)
    said = next((kind for kind, suffixes in SUFFIXES.items() if stem.lower().endswith(suffixes)), None)
    if named and said != named and not stem.lower().endswith(".img"):
        where = f"{path}: is {named} by its content, its name says {said or 'nothing of the kind'}"
        if zipped and named != "NIfTI":
            raise VolumeError(f"{where}; unpack it (gunzip), and rename it to {_renamed(stem, named)}")
        raise VolumeError(f"{where}; rename it to {_renamed(stem, named)}{'.gz' if zipped else ''}")


def content_kind(start: bytes) -> str | None:
    """Return the format of a file that begins with these bytes; None if it is not in `SUFFIXES`."""
    if start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    if re.match(rb"NRRD000[1-5]", start):
        return "NRRD"
    if re.match(rb"\s*(?:ObjectType|NDims)\s*=", start):
        return "MetaImage"
    return "DICOM" if start[128:132] == b"DICM" else None


def _renamed(stem: str, kind: str | None) -> str:
    """Return the name with a suffix of the kind."""
    if kind is None or stem.lower().endswith(SUFFIXES[kind]):
        return stem
    every = [suffix for suffixes in SUFFIXES.values() for suffix in suffixes]
    bare = next((stem[: -len(suffix)] for suffix in every if stem.lower().endswith(suffix)), stem)
    return bare + SUFFIXES[kind][0]


def _unpacked(path: Path) -> bytes:
    """Return the first bytes within a gzip file; b"" if it is damaged, which its reader reports better."""
    try:
        with gzip.open(path) as file:
            return file.read(START_BYTES)
    except (OSError, EOFError, zlib.error):
        return b""
