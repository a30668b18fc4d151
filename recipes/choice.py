"""Choose channels and mask among the roles of a layout. What may be one thing or another is asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from files.names import same_name
from volumes.data.alignment import MIN_SHARE
from volumes.volume import VolumeError

from .contents import Look, Reader, spread
from .grids import case_fault, least_shown, on_one_grid, remaining_share, same_grid
from .layouts.layout import MASK_WORD, Key, Layout, case_name, has_word
from .layouts.structures import ROLE as STRUCTURES

LOOKED_AT = 2  # files of a role, to tell masks from images
FEW_VALUES = 32  # distinct whole numbers, up to which a file is taken for a mask whatever its name
MOSTLY_THERE = 0.9  # of the cases, that must have a channel for it to be used unasked
HALF = 0.5  # of the cases, that must have a mask for the others to be left out unasked
MOST_OF_IT = 0.5  # of a scan, that must remain for the rest to be cut away unasked
MOST_VOLUMES = 8  # of a 4-D file that become channels unasked
NONE = "none"


class Ambiguous(ValueError):
    """The files may be read in several ways; the message says what to type."""


@dataclass(frozen=True)
class Channel:
    """A channel: its name, its role in the layout, and which volume of 4-D files it is."""

    name: str
    role: str
    volume: int | None = None


@dataclass
class Choice:
    """What a recipe is made of.

    Attributes:
        channels: in the order of the model's channels.
        mask: its role; `STRUCTURES` for one that is made of binary files; None without masks.
        reference: the role onto whose grid the others are resampled; None if all lie on one grid.
        why_reference: its reason, for data.yaml.
        keys: the cases that have all of them.
        segments: {name of a segment: label value} of DICOM masks, for labels that are called otherwise.
        sure: what was left out, and why.
        unsure: what the user should look at.
    """

    channels: list[Channel]
    mask: str | None
    keys: list[Key]
    reference: str | None = None
    why_reference: str = ""
    segments: dict[str, int] = field(default_factory=dict)
    sure: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)

    @property
    def roles(self) -> list[str]:
        """The roles that are read, each once, without masks that are made."""
        mask = [self.mask] if self.mask not in (None, STRUCTURES) else []
        return list(dict.fromkeys([*(channel.role for channel in self.channels), *mask]))


def choose(
    layout: Layout, reader: Reader, channels: Sequence[str] = (), mask: str | None = None, volume: int | None = None,
    resample_to: str | None = None,
) -> Choice:  # fmt: skip
    """Choose channels and mask.

    Args:
        layout: of the files.
        reader: of the folder.
        channels: names that the user gave; empty to choose.
        mask: the name that the user gave, "none" for no mask; None to choose.
        volume: which volume of 4-D files is the image; None makes each a channel.
        resample_to: the channel onto whose grid the others are resampled; None to choose where they lie on several.

    Raises:
        Ambiguous: if the files may be read in several ways.
        ValueError: for names that are not there.
    """
    masks = {role for role in layout.roles if _is_mask(layout, reader, role)}
    choice = Choice([], None, layout.keys, sure=list(layout.notes))
    if not channels and not set(layout.roles) - masks:
        _refuse_empty_images(layout, reader, masks)
    choice.mask = _chosen_mask(layout, reader, masks, mask)
    if choice.mask in layout.doubtful:
        raise Ambiguous(f"{layout.doubtful[choice.mask]}, or say --mask none")
    images = [role for role in layout.roles if role not in masks and role != choice.mask]
    if channels:
        roles = [_find_role(layout, name, [role for role in layout.roles if role != choice.mask]) for name in channels]
    else:
        roles = [role for role in images if role not in layout.secondary] or images
    if not roles:
        raise ValueError(
            f"no image was found beside {_listed(layout, sorted(masks))}; name the images by --channels NAME, or learn "
            "label maps alone by data.image_labels (docs/from_nothing.md)"
        )
    choice.reference = _reference(layout, reader, choice, roles, resample_to)
    choice.channels = _channels(layout, reader, roles, volume)
    _keep_complete(layout, reader, choice, asked=bool(channels), mask_asked=mask is not None)
    if resample_to is not None and on_one_grid(layout, reader, choice.keys, [*roles, choice.mask or roles[0]]):
        choice.why_reference = "as asked, without effect: the volumes of each case lie on one grid"
        choice.sure.append(f"--resample_to {resample_to} has no effect: the volumes of each case lie on one grid")
    for role in sorted({*layout.roles} - {*choice.roles}):
        choice.sure.append(f"{layout.shown(role)} is not used; --channels or --mask would")
    return choice


def channel_name(role: str) -> str:
    """Return a channel's name for a role: `CT_image` -> ct."""
    words = [word for word in re.split(r"[^\w]+|_", role) if word]
    kept = [word for word in words if not re.fullmatch(r"images?|imgs?|vols?|volumes?|scans?", word, re.IGNORECASE)]
    return "_".join(kept or words).lower() or "image"


def _is_mask(layout: Layout, reader: Reader, role: str) -> bool:
    if layout.masks is not None:
        return role in layout.masks
    if role in layout.outlined:
        return True
    looks = _looks_of(layout, reader, role)
    if not looks:
        return has_word(MASK_WORD, role)
    most = max(len(look.distinct) if look.distinct is not None else 10**9 for look in looks)
    return most <= FEW_VALUES or (has_word(MASK_WORD, role) and most < 10**9)


def _refuse_empty_images(layout: Layout, reader: Reader, masks: set[str]) -> None:
    """Raise ValueError if files seem to be masks only because all their voxels hold one value."""
    empty = []
    for role in sorted(masks - {*layout.outlined, *(layout.masks or ())}):
        looks = _looks_of(layout, reader, role)
        if looks and all(look.low == look.high for look in looks):
            empty.append(role)
    if empty:
        raise ValueError(
            f"{_listed(layout, empty)}: all voxels of each file hold one value, so they show nothing; no other file is "
            "an image. Look whether the files were converted or copied to the end"
        )


def _looks_of(layout: Layout, reader: Reader, role: str) -> list[Look]:
    """Return what some files of a role hold."""
    files = layout.of_role(role)
    paths = spread([files[key].path for key in sorted(files)], LOOKED_AT)
    return [look for path in paths for look in _look(reader, path)]


def _look(reader: Reader, path: str) -> list[Look]:
    try:
        return reader.looks(path)
    except VolumeError:  # named when the cases are checked
        return []


def _chosen_mask(layout: Layout, reader: Reader, masks: set[str], asked: str | None) -> str | None:
    if asked is not None:
        if same_name(asked) == NONE:
            return None
        if layout.structures and same_name(asked) == STRUCTURES:
            return STRUCTURES
        return _find_role(layout, asked, layout.roles)
    if layout.structures:
        return STRUCTURES
    if len(masks) > 1:
        raise Ambiguous(
            f"{len(masks)} files could be the mask: {_listed(layout, sorted(masks))}; "
            f"say {_ways(layout, reader, masks)}, or --mask none"
        )
    return next(iter(masks), None)


def _ways(layout: Layout, reader: Reader, masks: set[str]) -> str:
    """Return `--mask NAME` for each mask, with the images on its grid if they differ."""
    images = [role for role in layout.roles if role not in masks]
    near = {mask: [role for role in images if same_grid(layout, reader, mask, role)] for mask in sorted(masks)}
    if len({tuple(roles) for roles in near.values()}) == 1:
        return " or ".join(f"--mask {_quoted(mask)}" for mask in near)
    return " or ".join(
        f"--mask {_quoted(mask)} (on the grid of {', '.join(roles) or 'no image'})" for mask, roles in near.items()
    )


def _find_role(layout: Layout, name: str, roles: Sequence[str]) -> str:
    """Return the role that a user means. Raises: ValueError listing the roles."""
    found = _named_roles(layout, name, roles)
    if len(found) == 1:
        return found[0]
    what = "may be several files" if found else "matches none of the files"
    raise ValueError(f"{name} {what}; there are {', '.join(map(_quoted, found or layout.roles))}")


def _named_roles(layout: Layout, name: str, roles: Sequence[str]) -> list[str]:
    """Return the roles that a name may mean; only the one that is called exactly so, if there is one."""

    def names(role: str) -> set[str]:
        shown = layout.shown(role)
        given = layout.channel_names.get(role, [])
        return {same_name(one) for one in (role, role.rpartition("/")[2], channel_name(role), shown, *given)}

    found = [role for role in roles if same_name(name) in names(role)]
    exact = [role for role in found if same_name(role) == same_name(name)]
    return exact if len(exact) == 1 else found


def _reference(layout: Layout, reader: Reader, choice: Choice, roles: Sequence[str], asked: str | None) -> str | None:
    """Return the channel onto whose grid the others and the mask are resampled; None if they lie on one grid.

    Raises:
        Ambiguous: if most of that channel would be cut away, unless the user asked for it.
        ValueError: if the user asked for another file than a channel.
    """
    reference = least_shown(layout, reader, roles, choice.mask) if asked is None else _asked_grid(layout, asked, roles)
    shown = [*roles, *([choice.mask] if choice.mask is not None else [])]
    others = [role for role in shown if role != reference]
    off = [role for role in others if not same_grid(layout, reader, reference, role)]
    if not off:
        choice.why_reference = "as asked; the volumes of some cases lie on several grids"
        return None if asked is None else reference
    share = remaining_share(layout, reader, shown, reference)
    grid, apart = layout.shown(reference), ", ".join(_shown(layout, role) for role in off)
    ways = _other_ways(layout, reader, choice, roles, reference)
    if asked is None and MIN_SHARE <= share < MOST_OF_IT:
        name = "image" if len(roles) == 1 else _quoted(reference)
        ways = [f"--resample_to {name} (which cuts it)", *ways, *(["--mask none"] if choice.mask in off else [])]
        raise Ambiguous(
            f"{apart} {'shows' if len(off) == 1 else 'show'} only {share:.0%} of the box of {grid}, and the rest of "
            f"{grid} would be cut away; say {' or '.join(ways)}"
        )
    why = "as asked" if asked else "the channel that shows the least" if len(roles) > 1 else "the channel"
    choice.why_reference = f"volumes lie on several grids; {'this one was asked for' if asked else why}"
    choice.unsure.append(
        f"{apart} {'lies' if len(off) == 1 else 'lie'} on another grid than {grid}, {why}, and "
        f"{'is' if len(off) == 1 else 'are'} resampled onto its grid (data.resample_to); {share:.0%} of its box remains"
        + (f"; or say {' or '.join(ways)}" if ways and asked is None else "")
    )
    return reference


def _asked_grid(layout: Layout, asked: str, roles: Sequence[str]) -> str:
    """Return the channel that --resample_to names. Raises: ValueError for other names, listing the channels."""
    if len(roles) == 1 and same_name(asked) == "image":
        return roles[0]
    found = _named_roles(layout, asked, roles)
    if len(found) == 1:
        return found[0]
    known = _named_roles(layout, asked, layout.roles)
    what = "may be several" if found else "is not a channel of this recipe" if known else "matches none of the channels"
    raise ValueError(f"--resample_to {asked}: {what}; the channels are {', '.join(map(_quoted, found or roles))}")


def _other_ways(layout: Layout, reader: Reader, choice: Choice, roles: Sequence[str], reference: str) -> list[str]:
    """Return options that decide otherwise than to resample everything onto the reference."""
    first = choice.mask or roles[0]
    on_it = [role for role in roles if role == first or same_grid(layout, reader, first, role)]
    ways = [f"--resample_to {_quoted(role)}" for role in roles if role != reference]
    return ways + ([f"--channels {','.join(map(_quoted, on_it))} (without the others)"] if on_it else [])


def _shown(layout: Layout, role: str) -> str:
    """Return how a role is called in messages, that of structures included."""
    return "structures" if role == STRUCTURES else layout.shown(role)


def _channels(layout: Layout, reader: Reader, roles: Sequence[str], volume: int | None) -> list[Channel]:
    """Return the channels of these roles: one each, or one per volume of 4-D files."""
    channels: list[Channel] = []
    for role in roles:
        files = layout.of_role(role)
        count = max((_volumes(reader, files[key].path) for key in files), default=1)
        names = [channel_name(name) for name in layout.channel_names.get(role, [])]
        plain = names[0] if len(names) == 1 else "image" if len(roles) == 1 and not names else channel_name(role)
        if count == 1:
            channels.append(Channel(plain, role))
        elif volume is not None:
            channels.append(Channel(plain, role, volume))
        elif len(names) != count and count > MOST_VOLUMES:
            raise Ambiguous(
                f"{layout.shown(role)} holds {count} volumes (4-D); say which one is the image: --time_point 0"
            )
        else:
            names = names if len(names) == count else [f"{plain}_{index}" for index in range(count)]
            channels += [Channel(name, role, index) for index, name in enumerate(names)]
    if volume is not None and all(channel.volume is None for channel in channels):
        raise ValueError(f"--time_point {volume}: no channel is 4-D; leave it out")
    twice = {channel.name for channel in channels if [c.name for c in channels].count(channel.name) > 1}
    return [Channel(same_role(c), c.role, c.volume) if c.name in twice else c for c in channels]


def same_role(channel: Channel) -> str:
    """Return a name that no other role's channel has."""
    return re.sub(r"\W+", "_", channel.role) + ("" if channel.volume is None else f"_{channel.volume}")


def _volumes(reader: Reader, path: str) -> int:
    try:
        return reader.grid(path).volumes
    except VolumeError:  # named when the cases are checked
        return 1


def _keep_complete(layout: Layout, reader: Reader, choice: Choice, *, asked: bool, mask_asked: bool) -> None:
    """Keep the cases that have every file, on one grid.

    Raises:
        Ambiguous: if many cases lack a channel or the mask.
    """
    files = {role: layout.of_role(role) for role in choice.roles}
    keys = layout.keys
    for role in dict.fromkeys(channel.role for channel in choice.channels):
        share = len(files[role]) / len(keys)
        if share < MOSTLY_THERE and not asked and len(choice.channels) > 1:
            others = [one for one in choice.roles if one not in (role, choice.mask)]
            raise Ambiguous(
                f"{layout.shown(role)} is there for {len(files[role])} of {len(keys)} cases; say --channels "
                f"{','.join(map(_quoted, others))} to leave it out, or --channels "
                f"{','.join(map(_quoted, [*others, role]))} to use the cases that have it"
            )
    mask = choice.mask
    there = set(layout.structures) if mask == STRUCTURES else set(files[mask]) if mask is not None else set(keys)
    if mask is not None and not mask_asked and len(there & set(keys)) < HALF * len(keys):
        raise Ambiguous(
            f"{len(there)} of {len(keys)} cases have a mask ({mask}); say --mask none to use all without masks, or "
            f"--mask {_quoted(mask)} to use those that have one"
        )
    kept, lacking, refused = [], [], []
    for key in keys:
        if any(key not in files[role] for role in choice.roles) or key not in there:
            lacking.append(case_name(key))
            continue
        paths = {role: files[role][key].path for role in choice.roles}
        if mask == STRUCTURES:
            paths[STRUCTURES] = next(iter(layout.structures[key].values()))
        reason = case_fault(reader, paths, choice.reference)
        if reason:
            refused.append(reason)
        else:
            kept.append(key)
    if lacking:
        choice.unsure.append(f"{len(lacking)} cases lack a file and are left out: {_some(lacking)}")
    if refused:
        choice.unsure.append(f"{len(refused)} cases cannot be used and are left out: {_some(refused, 3, '; ')}")
    if not kept:
        raise ValueError(f"no case has all of {_listed(layout, choice.roles)}: {_some(refused or lacking, 3, '; ')}")
    choice.keys = kept


def _listed(layout: Layout, roles: Sequence[str]) -> str:
    return ", ".join(layout.shown(role) for role in roles)


def _some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _quoted(name: str) -> str:
    """Return a name as it is typed in a shell."""
    return name if re.fullmatch(r"[\w./-]+", name) else f"'{name}'"
