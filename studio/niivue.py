"""NiiVue, the viewer of the page: one file of JavaScript in the package ipyniivue, which is served from there."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "ipyniivue"
# The widget makes its viewer right after this message, by a class whose name the bundler shortened.
CLASS = re.compile(r"Creating new Niivue instance.{0,80}?=new ([\w$]+)\(")
TESTED = "2.4.4"


def niivue_module() -> str:
    """Return NiiVue as a module of JavaScript that exports the class `Niivue`.

    Raises: ValueError without ipyniivue, and for a version of it whose file is arranged in another way.
    """
    spec = find_spec(PACKAGE)  # it is not imported: that takes a second, and ipywidgets
    if spec is None or spec.origin is None:
        raise ValueError("the studio's viewer is not installed; pip install -e '.[studio]' -c constraints.txt")
    return with_export(Path(spec.origin).parent / "static" / "widget.js")


def with_export(file: Path) -> str:
    """Return the module in `file`, with an export of NiiVue's class added. Errors as `niivue_module`."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = CLASS.search(text)
    if found is None:
        raise ValueError(
            f"{PACKAGE} {installed()} has another layout than the studio knows; pip install {PACKAGE}=={TESTED}"
        )
    return f"{text}\nexport{{{found[1]} as Niivue}};\n"


def installed() -> str:
    """Return the version of ipyniivue."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "(of unknown version)"
