"""Import other people's code from a checkout that the user names. Nothing of it is part of this repository."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

# Imported by the seeds for pictures, films and data sets of their own; training and sampling do not use them.
UNUSED = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.utils",
    "torchvision.models",
    "skvideo",
    "skvideo.io",
    "imageio",
    "imageio.core",
    "imageio.core.util",
)


@contextmanager
def imported(checkout: Path, needed: Sequence[str], required: Sequence[str] = ()) -> Iterator[list[ModuleType]]:
    """Import modules of a checkout.

    Inside the block its folder is the first on the path; afterwards its modules are forgotten, for two checkouts have
    modules of the same names.

    Args:
        needed: names of its modules.
        required: packages that must be installed. Those in `UNUSED` may be missing.
    Raises: ValueError for a folder that is not such a checkout, and for missing packages, with what to type.
    """
    for name in needed:
        if not any((checkout / name.replace(".", "/")).with_suffix(end).exists() for end in (".py", "")):
            raise ValueError(f"{checkout}: has no module {name}; give the root of the clone")
    missing = []
    for name in required:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name.replace("_", "-"))
    if missing:
        raise ValueError(f"{checkout} needs packages that are not installed: pip install {' '.join(missing)}")
    before = set(sys.modules)
    stand_ins = [name for name in UNUSED if not _importable(name)]
    sys.modules.update({name: MagicMock(name=name) for name in stand_ins})
    sys.path.insert(0, str(checkout.resolve()))
    try:
        yield [importlib.import_module(name) for name in needed]
    finally:
        sys.path.remove(str(checkout.resolve()))
        for name in {module for module in set(sys.modules) - before if _lies_in(module, checkout)} | set(stand_ins):
            sys.modules.pop(name, None)


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError):  # not installed, or built for another torch or numpy
        for module in [known for known in sys.modules if known.partition(".")[0] == name.partition(".")[0]]:
            del sys.modules[module]
        return False
    return True


def _lies_in(module: str, checkout: Path) -> bool:
    found = sys.modules[module]
    file = getattr(found, "__file__", None)
    places = [file] if isinstance(file, str) else [*getattr(found, "__path__", [])]  # a folder without __init__.py
    return any(Path(place).resolve().is_relative_to(checkout.resolve()) for place in places)


@contextmanager
def on(device: str, folder: Path) -> Iterator[None]:
    """Let `.cuda()`, which the seeds call, move to `device`, and let them write below `folder`.

    It is the working directory inside the block.
    """
    tensor: Any = torch.Tensor
    module: Any = nn.Module
    kept = tensor.cuda, module.cuda
    tensor.cuda = lambda self, *_, **__: self.to(device)
    module.cuda = lambda self, *_, **__: self.to(device)
    try:
        with chdir(folder):
            yield
    finally:
        tensor.cuda, module.cuda = kept
