"""Layouts without a description: a folder per patient, a folder per kind of file, names that end alike in one folder.

Each way to read the paths is a guess of (case, role) for every file. Known words (CT, mask, images, ...) in the roles
speak for a guess; then the one is taken that leaves the fewest gaps: where each case has each role.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from files.names import nfc, same_name
from recipes.listing import Listing, stem_of, suffix_of

from .layout import IMAGE_WORD, MASK_WORD, VISIT, FoundFile, Key, Layout, fill_of, has_word, pattern_of

SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
DEEPEST = 3  # folders of a case
MOST_ROLES = 60
RARE = 0.05  # of the cases: files of a role in fewer are extras
FULL_ENOUGH = 0.3  # of all combinations of case and role
SHARED = 1.5  # cases that have a role, on average
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0)  # of the files of a folder, that an ending must have to be a role
DIGITS = re.compile(r"\d[\d.\-]*")


@dataclass(frozen=True)
class Guess:
    """One reading of the paths: what each file would be."""

    kind: str
    files: tuple[FoundFile, ...]
    extras: tuple[str, ...]

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Return how good the guess is; the highest is taken."""
        roles = {file.role for file in self.files}
        cases = {file.key for file in self.files}
        known = sum(has_word(IMAGE_WORD, role) or has_word(MASK_WORD, role) for role in roles)
        fill = fill_of((file.key, same_name(file.role)) for file in self.files)
        return 2 * known >= len(roles), round(fill, 1), len(cases) - len(roles)


def find_folders(listing: Listing) -> Layout:
    """Read the paths of a folder that has no description.

    Raises:
        ValueError: if no reading makes cases of the files.
    """
    paths = [nfc(path) for path in listing.volumes]
    on_disk = dict(zip(paths, listing.volumes, strict=True))
    firsts = {path.partition("/")[0].lower() for path in paths if "/" in path}
    by_split = len(firsts) > 1 and firsts <= set(SPLIT_FOLDERS) and all("/" in path for path in paths)
    guesses = [guess for guess in _guesses(paths, by_split) if guess.files]
    fitting = [guess for guess in guesses if _is_possible(guess)]
    if not fitting:
        raise ValueError(
            f"{listing.root}: no scheme was found in the names of its {len(paths)} volumes, such as "
            f"{', '.join(paths[:3])}; name "
            "the files in a table (columns such as subject, ct, mask) and give it by --table FILE"
        )
    best = max(fitting, key=lambda guess: guess.rank)
    files = [
        FoundFile(on_disk[file.path], file.key, file.role, file.pattern if file.path == on_disk[file.path] else "")
        for file in best.files
    ]
    notes = (
        [f"{len(best.extras)} files fit no case, and are left out: {', '.join(best.extras[:3])}"] if best.extras else []
    )
    return Layout(best.kind, _one_spelling(files), notes=notes)


def _guesses(paths: Sequence[str], by_split: bool) -> list[Guess]:
    start = 1 if by_split else 0
    deepest = max(path.count("/") for path in paths) - start
    guesses = [_by_kind(paths, start)]
    for depth in range(1, min(deepest, DEEPEST) + 1):
        guesses.append(_by_patient(paths, start, depth))
    return guesses


def _is_possible(guess: Guess) -> bool:
    roles = {same_name(file.role) for file in guess.files}
    if len(guess.files) < SHARED * len(roles):
        return False
    once = Counter((file.key, same_name(file.role)) for file in guess.files)
    if len(guess.extras) > len(guess.files) or len({file.key for file in guess.files}) < 2:
        return False
    return len(roles) <= MOST_ROLES and max(once.values()) == 1 and guess.rank[1] >= FULL_ENOUGH


def _split_field(parts: Sequence[str], start: int) -> Key:
    return (("split", SPLIT_FOLDERS[parts[0].lower()]),) if start else ()


def _split_piece(parts: Sequence[str], start: int) -> str:
    """Return the pattern's piece for the folder of a split: in braces if it is called as the split is."""
    return ("{split}/" if parts[0] in SPLIT_FOLDERS.values() else f"{parts[0]}/") if start else ""


def _by_patient(paths: Sequence[str], start: int, depth: int) -> Guess:
    """Read the first folders as the case: p01/CT.nii.gz, p01/visit1/CT.nii.gz."""
    names = ["subject", "session", "series"][:depth]
    found, extras = [], []
    for path in paths:
        *folders, _ = parts = path.split("/")
        if len(folders) - start < depth:
            extras.append(path)
            continue
        own = folders[start : start + depth]
        values = dict(zip(names, own, strict=True))
        rest = [*folders[start + depth :], stem_of(path)]
        role = [pattern_of(piece, values, ignore_case=True) for piece in rest]
        plain = [re.sub(r"\{\w+\}", "", piece).strip(" _-.") for piece in role]
        pieces = [pattern_of(piece, values) for piece in rest]
        head = _split_piece(parts, start) + "/".join(f"{{{name}}}" for name in names)
        pattern = f"{head}/{'/'.join(pieces)}{suffix_of(path)}"
        key = (*_split_field(parts, start), *values.items())
        found.append(FoundFile(path, key, "/".join(filter(None, plain)) or "image", pattern))
    found = _without_constant(found, names)
    return _without_rare("a folder per patient", _merged_dates(found), extras)


def _without_constant(found: list[FoundFile], names: Sequence[str]) -> list[FoundFile]:
    """Take folders that are equal for all cases out of the key: p01/scans/CT.nii.gz."""
    for name in names[1:]:
        values = {dict(file.key)[name] for file in found}
        if len(values) == 1:
            value = next(iter(values))
            found = [
                FoundFile(
                    file.path,
                    tuple(item for item in file.key if item[0] != name),
                    file.role,
                    file.pattern.replace(f"{{{name}}}", value),
                )
                for file in found
            ]
    return found


def _merged_dates(found: list[FoundFile]) -> list[FoundFile]:
    """Read digits in a role as `*` if each role is that of one file: CT_20190301.nii.gz."""
    if len({file.role for file in found}) * 2 <= len(found) or len(found) < 2:
        return found
    merged = [
        FoundFile(
            file.path,
            file.key,
            DIGITS.sub("", file.role).strip(" _-.") or "image",
            file.pattern.rpartition("/")[0] + "/" + _starred(file.pattern.rpartition("/")[2], file.role),
        )
        for file in found
    ]
    return merged if 2 * len({file.role for file in merged}) <= len(found) else found


def _starred(name: str, role: str) -> str:
    stem = name[: len(name) - len(suffix_of(name))]
    return DIGITS.sub("*", stem) + suffix_of(name) if DIGITS.search(role) else name


def _by_kind(paths: Sequence[str], start: int) -> Guess:
    """Read the folder and the end of the name as the role: images/c1.nii.gz, labels/c1_seg.nii.gz, c1_CT.nii.gz."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        by_folder.setdefault("/".join(path.split("/")[start:-1]), []).append(path)
    groups: dict[str, dict[str, tuple[str, str]]] = {}  # folder -> stem -> (case, role in the folder)
    for folder, members in by_folder.items():
        groups[folder] = split_names(sorted({stem_of(path) for path in members}))
    groups = _without_heads(groups)
    found = []
    for folder, members in by_folder.items():
        for path in members:
            stem = stem_of(path)
            case, ending = groups[folder][stem]
            role = "/".join(filter(None, [folder if len(by_folder) > 1 else "", ending])) or "image"
            place = stem.rindex(case) if ending and not stem.startswith(case) else stem.index(case)
            named = f"{stem[:place]}{{case}}{stem[place + len(case) :]}"
            parts = path.split("/")
            pattern = "/".join(
                [*filter(None, [_split_piece(parts, start).strip("/"), folder]), named + suffix_of(path)]
            )
            found.append(FoundFile(path, (*_split_field(parts, start), ("case", case)), role, pattern))
    kind = "a folder per kind of file" if len(by_folder) > 1 else "all files in one folder"
    return _without_rare(kind, found, [])


def split_names(stems: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Split names into (case, role) by the ends that many share: `a_CT`, `b_CT` -> (a, CT), (b, CT).

    Beginnings count instead if they leave fewer gaps: `CT_1`, `mask_1`. Roles are "" if nothing is shared.
    """
    whole = {stem: (stem, "") for stem in stems}
    candidates = [whole]
    for from_end in (True, False):
        for share in SHARES:
            candidates.append(_split_at(stems, max(2, round(share * len(stems))), from_end))

    def rank(split: dict[str, tuple[str, str]]) -> tuple[bool, float, int, int]:
        if len(set(split.values())) < len(split):
            return False, 0.0, 0, 0
        roles = {role for _, role in split.values()}
        known = sum(has_word(IMAGE_WORD, role) or has_word(MASK_WORD, role) for role in roles)
        words = 2 * known >= len(roles)
        return words, round(fill_of(split.values()), 1), len({case for case, _ in split.values()}), -len(roles)

    return max(candidates, key=rank)


def _split_at(stems: Sequence[str], least: int, from_end: bool) -> dict[str, tuple[str, str]]:
    """Split each name at the longest end (or beginning) that at least so many names share."""
    ends: dict[str, list[tuple[str, str]]] = {}
    for stem in stems:
        for match in re.finditer(r"[\W_]+", stem):
            head, tail = stem[: match.start()], stem[match.end() :]
            case, role = (head, tail) if from_end else (tail, head)
            first = re.split(r"[\W_]+", role)[0]
            if case and first and not first[0].isdigit() and not VISIT.fullmatch(first):
                ends.setdefault(stem, []).append((case, role))
    counts = Counter(same_name(role) for options in ends.values() for _, role in options)
    split = {}
    for stem in stems:
        shared = [option for option in ends.get(stem, []) if counts[same_name(option[1])] >= least]
        split[stem] = max(shared, key=lambda option: len(option[1])) if shared else (stem, "")
    return split


def _without_heads(groups: dict[str, dict[str, tuple[str, str]]]) -> dict[str, dict[str, tuple[str, str]]]:
    """Take beginnings that all names of a folder share out of the cases if the folders then agree: img_1, lbl_1."""
    if len(groups) < 2:
        return groups

    def pairs(of: dict[str, dict[str, tuple[str, str]]]) -> Iterable[tuple[str, str]]:
        return [(case, folder + role) for folder, split in of.items() for case, role in split.values()]

    shorter = {}
    for folder, split in groups.items():
        heads = {re.split(r"(?<=[\W_])", case)[0] for case, _ in split.values()}
        head = next(iter(heads)) if len(heads) == 1 and len(split) > 1 else ""
        cut = {stem: (case.removeprefix(head), role) for stem, (case, role) in split.items()}
        shorter[folder] = cut if all(case for case, _ in cut.values()) else split
    return shorter if fill_of(pairs(shorter)) > fill_of(pairs(groups)) + 0.1 else groups


def _without_rare(kind: str, found: list[FoundFile], extras: list[str]) -> Guess:
    """Leave out roles that hardly any case has, such as an atlas beside the patients' folders."""
    cases = len({file.key for file in found})
    counts = Counter(same_name(file.role) for file in found)
    most = max(counts.values(), default=0)
    rare = {role for role, count in counts.items() if count <= max(1, RARE * cases) and count < most}
    kept = [file for file in found if same_name(file.role) not in rare]
    extras = [*extras, *(file.path for file in found if same_name(file.role) in rare)]
    return Guess(kind, tuple(kept), tuple(extras))


def _one_spelling(files: list[FoundFile]) -> list[FoundFile]:
    """Write each role as most of its files do: CT, ct."""
    spelled: dict[str, Counter[str]] = {}
    for file in files:
        spelled.setdefault(same_name(file.role), Counter())[file.role] += 1
    names = {role: counts.most_common(1)[0][0] for role, counts in spelled.items()}
    return [FoundFile(file.path, file.key, names[same_name(file.role)], file.pattern) for file in files]
