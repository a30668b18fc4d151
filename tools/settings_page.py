"""Write docs/settings.md from docs/settings.in.md and the annotations and docstrings of the classes of settings.

    python -m tools.settings_page

A test fails while the page is not what this command writes.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
BEGINNING = PAGE.with_name("settings.in.md")  # text before the tables


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="file to write (docs/settings.md)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
from cli.config_files import section_class
from cli.explained import argument_texts, default_of, summary
from cli.settings import describe, hints_of
from diffusion import LatentUNet3D
from files.atomic import write_text
from training import TrainLdmConfig, TrainVaeConfig

PROGRAMS = {"train_vae.py": TrainVaeConfig, "train_ldm.py": TrainLdmConfig}
MODELS = (AutoencoderKL3D, VQGAN3D, SpaceToDepth3D, LatentUNet3D)


def main(args: Sequence[str] | None = None) -> None:
    """Write the page."""
    options = parse(args)
    write_text(options.output, page())
    print(options.output)


def page() -> str:
    """Return the page as Markdown."""
    parts = [BEGINNING.read_text()]
    for program, owner in PROGRAMS.items():
        parts.append(f"## {program}\n\n{part(owner)}")
    for owner in sections():
        parts.append(f"## {owner.__name__}\n\n{part(owner)}")
    for owner in MODELS:
        named = f"`class: {owner.__module__.partition('.')[0]}.{owner.__name__}` in the section `model`.\n\n"
        parts.append(f"## {owner.__name__}\n\n{named}{part(owner)}")
    return "\n".join(parts)


def sections() -> list[Any]:
    """Return the dataclasses of all sections, in the order in which the programs' settings name them."""
    found: list[Any] = []
    waiting: list[Any] = [*PROGRAMS.values()]
    while waiting:
        for hint in hints_of(waiting.pop(0)).values():
            if (section := section_class(hint)) is not None and section not in found:
                found.append(section)
                waiting.append(section)
    return found


def part(owner: Callable[..., Any]) -> str:
    """Return what a class is for, and the table of its settings."""
    texts = argument_texts(owner)
    about = "\n\n".join(" ".join(paragraph.split()) for paragraph in summary(owner).split("\n\n"))
    rows = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, hint in hints_of(owner).items():
        section, values = section_class(hint), describe(hint)
        if section is not None:
            values = re.sub(r"settings \{[^}]*\}", f"[{section.__name__}](#{section.__name__.lower()})", values)
        default = default_of(owner, name).removeprefix("default: ")
        default = default if default == "required" else f"`{default}`"
        cells = (f"`{name}`", values, default, texts.get(name, ""))
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return f"{about}\n\n" + "\n".join(rows) + "\n"
