"""Writing the final folder of a run."""

import shutil
from pathlib import Path
from typing import Any


def save_model(model: Any, folder: Path) -> None:
    """`model.save_pretrained(folder)` that replaces an older folder only once the new one is complete."""
    partial = folder.with_name(f".partial_{folder.name}")
    if partial.exists():
        shutil.rmtree(partial)
    model.save_pretrained(str(partial), safe_serialization=True)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
