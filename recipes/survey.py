"""Look a folder over and propose a recipe: from options to settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from volumes.data.preprocessing import common_spacing
from volumes.data.tables import Row
from volumes.volume import VolumeError

from .choice import Choice, choose
from .contents import SAMPLED, Look, Reader, spread
from .grids import case_grids
from .labels import find_labels, keep_asked, read_drawn
from .layouts.bids import find_bids
from .layouts.described import find_described
from .layouts.folders import find_folders
from .layouts.layout import Layout
from .layouts.listed import find_listed
from .layouts.series import find_series
from .layouts.structures import ROLE as STRUCTURES
from .layouts.structures import find_structures
from .listing import Listing, list_folder
from .people import People, conditions, find_people, read_tables, table_path
from .proposals.intensity import Proposal, propose_intensity
from .proposals.machine import Machine, this_machine
from .proposals.sizing import Facts, Plan, Settings, propose, volume_limit
from .proposals.starts import Start, choose_start
from .section import DataSection, data_config, find_section
from .synthetic import find_synthetic

KEEP = "keep"


@dataclass(frozen=True)
class Options:
    """What the user said.

    Attributes:
        folder: of the scans.
        output: folder of the recipe.
        quick: a tiny model and few steps.
        channels, mask, resample_to, subject, group_by, table, classes, numbers, structures, label_names: see `parse`
            of the command.
        time_point: which volume of 4-D files is the image.
        spacing: mm; () to propose one, or ("keep",).
        mirror: whether volumes may be mirrored from left to right.
        start: "none", or the shipped weights to start from; None to propose, see `choose_start`.
    """

    folder: Path
    output: Path
    quick: bool = False
    channels: Sequence[str] = ()
    mask: str | None = None
    resample_to: str | None = None
    subject: str | None = None
    group_by: str | None = None
    table: str | None = None
    classes: Sequence[str] = ()
    numbers: Sequence[str] = ()
    structures: Sequence[str] = ()
    label_names: dict[int, str] = field(default_factory=dict)
    time_point: int | None = None
    spacing: Sequence[str | float] = ()
    mirror: bool = True
    start: str | None = None


@dataclass
class Survey:
    """Everything that was found and proposed.

    Attributes:
        options: what the user said.
        layout, choice, people: of the files.
        scalings: of each channel, with the intensities that were seen: (lowest, highest).
        ranges: lowest and highest value of each channel.
        labels: {value: (name, cases that have it)}, with the background.
        masks_read: how many masks the labels were read from.
        shapes: (n, 3) voxels of the files; spacings: (n, 3) mm.
        spacing: that the data are resampled to; None to keep the files'.
        section: data.yaml.
        machine: that the plan is for.
        plan: vae.yaml and ldm.yaml.
        notes: what was left out; unsure: what the user should look at.
    """

    options: Options
    layout: Layout
    choice: Choice
    people: People
    scalings: dict[str, Proposal]
    ranges: dict[str, tuple[float, float]]
    labels: dict[int, tuple[str, int]]
    masks_read: int
    shapes: np.ndarray
    spacings: np.ndarray
    spacing: list[float] | None
    section: DataSection
    machine: Machine
    plan: Plan
    notes: list[str]
    unsure: list[str]


def find_layout(listing: Listing, table: str | None) -> tuple[Layout, dict[str, list[Row]], list[str]]:
    """Return the layout of a folder, the tables beside the files, and notes on tables that cannot be read.

    Raises:
        ValueError: if nothing fits.
    """
    names = [table_path(listing, table)] if table is not None else list(listing.tables)
    tables, notes = read_tables(listing, names, asked=table is not None)
    for name, rows in tables.items():
        if (layout := find_listed(listing, name, rows)) is not None:
            return layout, {other: r for other, r in tables.items() if other != name}, notes
    for find in (find_described, find_bids, find_structures, find_series):
        if (layout := find(listing)) is not None:
            break
    else:
        layout = find_folders(listing)
    if table is None and layout.table is not None:
        tables = {layout.table: tables[layout.table]} if layout.table in tables else {}
    return layout, tables, notes


def look_over(options: Options, machine: Machine | None = None) -> Survey:
    """Look a folder over, and propose a recipe. Nothing is written, except label maps that are made of binary files.

    Args:
        options: what the user said.
        machine: that will train; this one by default.

    Raises:
        Ambiguous: if the files may be read in several ways.
        ValueError: if no cases are found, and for options that do not fit.
    """
    listing = list_folder(options.folder, skip=options.output)
    layout, tables, notes = find_layout(listing, options.table)
    if listing.twins:
        notes.append(
            f"{len(listing.twins)} files have a twin with another suffix and are left out: {listing.twins[0]}, ..."
        )
    reader = Reader(options.folder, layout.drawn_on)
    choice = choose(layout, reader, options.channels, options.mask, options.time_point, options.resample_to)
    keep_asked(options.structures, layout, choice)
    drawn = read_drawn(options.structures, layout, choice, reader)
    people = find_people(choice.keys, layout.metadata, tables, subject=options.subject, group_by=options.group_by)
    classes, numbers = conditions(people, choice.keys, options.classes, options.numbers)
    scalings, ranges = _intensities(layout, choice, reader)
    labels, masks_read = find_labels(options, layout, choice, reader, drawn)
    reference = choice.reference or choice.channels[0].role
    shown = [*choice.roles, *([STRUCTURES] if choice.mask == STRUCTURES else [])]
    shapes, spacings = case_grids(layout, reader, choice.keys, shown, reference)
    machine = machine or this_machine()
    spacing, why_spacing, unsure_spacing = _spacing(options, shapes, spacings, volume_limit(machine, options.quick))
    others = _others(choice, scalings, labels, spacing, classes, numbers)
    section = find_section(listing, layout, choice, people, options.output, others)
    section.why |= {f"intensity.{name}": proposal.why for name, proposal in scalings.items()}
    section.why["resample_to"] = choice.why_reference
    section.why |= {"spacing": why_spacing, "classes": "conditions of the model", "numbers": "conditions of the model"}
    section.why["intensity"] = next(iter(scalings.values())).why if len(scalings) == 1 else ""
    facts = _facts(choice, scalings, labels, shapes, spacings, spacing, section, [*classes, *numbers])
    start = choose_start(options.start, facts, quick=options.quick, exactly=bool(options.spacing))
    if (common := _weights_spacing(start, facts)) is not None:
        spacing, unsure_spacing = common, []
        section.settings["spacing"], section.why["spacing"] = common, "that of the weights to start from"
        facts = _facts(choice, scalings, labels, shapes, spacings, spacing, section, [*classes, *numbers])
    plan = propose(facts, machine, start, quick=options.quick, mirror=options.mirror)
    if not options.quick:  # whose models are tiny
        from .proposals.memory import fit_memory  # imports all of training, which takes seconds

        fit_memory(plan, facts, machine, data_config(section.settings, options.folder))
    unsure = [*find_synthetic(listing), *choice.unsure, *people.unsure, *unsure_spacing, *plan.unsure]
    unsure += [proposal.unsure for proposal in scalings.values() if proposal.unsure]
    if choice.mask is not None and masks_read < len(choice.keys):
        unsure.append(f"labels were read from {masks_read} of {len(choice.keys)} masks; others may hold more values")
    return Survey(
        options, layout, choice, people, scalings, ranges, labels, masks_read, shapes, spacings, spacing, section,
        machine, plan, [*notes, *choice.sure], unsure,
    )  # fmt: skip


def _intensities(
    layout: Layout, choice: Choice, reader: Reader
) -> tuple[dict[str, Proposal], dict[str, tuple[float, float]]]:
    """Return the proposed scaling and the range of values of each channel, from a sample of the volumes."""
    looks: dict[str, list[Look]] = {channel.name: [] for channel in choice.channels}
    for role in dict.fromkeys(channel.role for channel in choice.channels):
        files = layout.of_role(role)
        for path in spread([files[key].path for key in choice.keys], SAMPLED):
            found = reader.looks(path)
            for channel in choice.channels:
                if channel.role == role:
                    index = channel.volume or 0
                    if index >= len(found):
                        raise VolumeError(f"{reader.root / path}: holds {len(found)} volumes, and none at {index}")
                    looks[channel.name].append(found[index])
    hints = {
        channel.name: f"{channel.name} {layout.name}" if "ct" in channel.name else channel.name
        for channel in choice.channels
    }
    scalings = {name: propose_intensity(hints[name].split(" ")[0], seen) for name, seen in looks.items()}
    return scalings, {name: (min(s.low for s in seen), max(s.high for s in seen)) for name, seen in looks.items()}


def _spacing(
    options: Options, shapes: np.ndarray, spacings: np.ndarray, most: int
) -> tuple[list[float] | None, str, list[str]]:
    """Return the spacing to resample to (None to keep the files'), why, and what is unsure of it."""
    common = common_spacing(spacings.tolist())
    if list(options.spacing) == [KEEP]:
        return None, "the files' own, as asked", []
    if options.spacing:
        return [float(mm) for mm in options.spacing], "as asked", []
    middle = np.array(common) if common else np.median(spacings, axis=0)
    voxels = (shapes * spacings / middle).prod(axis=1).max()
    if voxels > most:
        coarser = (middle * (voxels / most) ** (1 / 3)).round(2)
        told = " x ".join(f"{mm:g}" for mm in coarser)
        unsure = (
            f"volumes are resampled to {told} mm to fit this machine; say --spacing keep, or --spacing X Y Z, to decide"
        )
        return coarser.tolist(), f"coarser than the files, so that volumes have at most {most} voxels", [unsure]
    if common:
        return None, "all volumes have the same", []
    told = " x ".join(f"{mm:.3g}" for mm in middle)
    unsure = f"voxels differ in size; volumes are resampled to the median, {told} mm (--spacing keep does not)"
    return middle.round(3).tolist(), "the median: voxels differ in size", [unsure]


def _weights_spacing(start: Start, facts: Facts) -> list[float] | None:
    """Return the spacing that a U-Net to start from knows, if volumes would have another one."""
    if start.weights is None or not start.unet or common_spacing([facts.spacing, start.weights.spacing]):
        return None
    return list(start.weights.spacing)


def _others(
    choice: Choice, scalings: dict[str, Proposal], labels: dict[int, tuple[str, int]], spacing: list[float] | None,
    classes: dict[str, list[str]], numbers: list[str],
) -> Settings:  # fmt: skip
    """Return the settings of data.yaml that do not depend on the names of files."""
    single = len(scalings) == 1
    written = {
        name: {"kind": one.scaling.kind, "low": one.scaling.low, "high": one.scaling.high}
        for name, one in scalings.items()
    }
    settings: Settings = {}
    if choice.mask is not None:
        settings["label_names"] = {value: name for value, (name, _) in labels.items()}
    if choice.segments:
        settings["label_map"] = choice.segments
    if choice.reference is not None:
        of_reference = next(one.name for one in choice.channels if one.role == choice.reference)
        settings["resample_to"] = "image" if single else of_reference  # as `images` without names is called
    settings["spacing"] = spacing
    settings["intensity"] = next(iter(written.values())) if single else written
    if classes:
        settings["classes"] = classes
    if numbers:
        settings["numbers"] = numbers
    return settings


def _facts(
    choice: Choice, scalings: dict[str, Proposal], labels: dict[int, tuple[str, int]], shapes: np.ndarray,
    spacings: np.ndarray, spacing: list[float] | None, section: DataSection, names: list[str],
) -> Facts:  # fmt: skip
    seen = shapes if spacing is None else np.maximum(np.rint(shapes * spacings / np.array(spacing)), 1).astype(int)
    train = [case for case in section.cases if case.split == "train"]
    return Facts(
        [channel.name for channel in choice.channels],
        [scalings[channel.name].scaling.kind for channel in choice.channels],
        [name for name, _ in labels.values()],
        seen,
        np.median(spacings, axis=0).tolist() if spacing is None else spacing,
        len({case.subject for case in train}),
        len(train),
        names,
    )
