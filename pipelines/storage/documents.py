"""The documents of a pipeline: its card, its license and where its weights came from, saved and uploaded with them."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from files.documents import read_bytes
from files.paths import leads_out
from volumes.description import DataDescription

CARD = "README.md"
DOCUMENTS = (CARD, "LICENSE*", "provenance.json")
UNFILLED = "[More Information Needed]"  # in the card that diffusers writes for a repository without one
METADATA = "---\nlibrary_name: diffusers\ntags: [medvolume, medical-imaging, 3d]\n{license}---\n\n"


def document_files(folder: Path) -> list[Path]:
    """Return the files of a pipeline's folder that are its documents; the content of other files is not known.

    Warns: of links that lead out of the folder, which are left out.
    """
    found = []
    for path in sorted(path for pattern in DOCUMENTS for path in folder.glob(pattern) if path.is_file()):
        if leads_out(folder, path):
            warnings.warn(
                f"{path}: leads out of the folder, so it is not saved or uploaded; copy the file", stacklevel=3
            )
        else:
            found.append(path)
    return found


def read_documents(folder: Path) -> dict[str, bytes]:
    """Return {name: content} of a pipeline's documents. Raises: FileError for one that cannot be read."""
    return {path.name: read_bytes(path) for path in document_files(folder)}


def write_documents(documents: Mapping[str, bytes], folder: Path) -> None:
    """Write them into a folder that is being saved."""
    for name, content in documents.items():
        (folder / name).write_bytes(content)


def hub_card(card: str, data: DataDescription, license: str | None) -> str:
    """Return the text of README.md for a repository of the Hub: with the Hub's metadata, and with the license.

    Args:
        card: the pipeline's own, or the repository's; a short one takes the place of diffusers' unfilled template.
        data: description of the training set.
        license: that volumes of these weights must name; None for weights without such terms.
    """
    card = card.replace("\r\n", "\n")
    if UNFILLED in card:
        card = _short_card(data)
    if license and license not in card:
        card = f"{card.rstrip()}\n\n## License\n\nLicense of the weights: {license}.\n"
    if not card.startswith("---\n"):
        card = METADATA.format(license="license: other\n" if license else "") + card
    return card


def _short_card(data: DataDescription) -> str:
    of_maps = "label maps" if data.image_labels else f"volumes ({', '.join(data.channels)})"
    lines = ["# A pipeline of medvolume", "", f"Latent diffusion of {of_maps}."]
    if data.spacing is not None:
        lines += [f"Voxels: {' x '.join(f'{side:g}' for side in data.spacing)} mm."]
    if labels := data.image_labels or data.labels:
        lines += [f"Labels: {', '.join(f'{value} {name}' for value, name in labels.items())}."]
    lines += ["", "```python", "from medvolume import MedVolumePipeline", ""]
    lines += ['pipe = MedVolumePipeline.from_pretrained("this repository")', "```", ""]
    return "\n".join(lines)
