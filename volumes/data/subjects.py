"""Salted digests of a model's training subjects: they reveal a test set that overlaps them, and weights carry no names.

A record is {"salt": hex, "train": {kind: digests}, "validation": {kind: digests}}, with the digests of a kind in one
string, separated by spaces. A model carries a list of records: that of its own training, and those of the weights that
it started from. `UNRECORDED` means that some of these had no record.

docs/security.md explains how far a record hides names.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from .cases import Case
from .config import DataConfig

KINDS = ("subjects", "names", "voxels")
ROLES = ("train", "validation")
FORBIDDEN = {
    "train": (),
    "validation": ("train",),
    "test": ROLES,
}  # the roles that a case of a split must not have had for the model
DIGITS = 16  # of a stored digest: 64 bits, so that a million volumes share one by chance once in 40 million times
MAX_NAMED = 6  # of the overlapping subjects in a message

Marks = Mapping[str, frozenset[str]]


class SubjectRecord(TypedDict, total=False):
    """The record of one training as JSON, or `UNRECORDED`: the latter has no other entry.

    Attributes:
        salt: hexadecimal.
        train, validation: {kind: digests, separated by spaces}.
    """

    salt: str
    train: dict[str, str]
    validation: dict[str, str]
    unrecorded: bool


UNRECORDED: SubjectRecord = {"unrecorded": True}


@dataclass(frozen=True)
class Overlap:
    """A case that a model has seen: in which role, and by what it was recognized ("subjects", "names" or "voxels")."""

    case: Case
    role: str
    kind: str


def voxel_digests(array: np.ndarray, *, apart: bool = True) -> tuple[str, ...]:
    """Hash the voxels (C, X, Y, Z) in file units: one digest per channel, or one of all. Skips constant channels."""
    parts = [one[None] for one in array] if apart else [array]
    return tuple(_digest_voxels(part) for part in parts if part.size and part.min() < part.max())


def _digest_voxels(part: np.ndarray) -> str:
    values = np.ascontiguousarray(part, dtype=np.float32)
    return hashlib.sha256(f"{values.shape}".encode() + (values + 0.0).tobytes()).hexdigest()  # + 0: -0 is 0


def marks_of(case: Case, config: DataConfig, voxels: Iterable[str] = ()) -> dict[str, frozenset[str]]:
    """Return the digests that identify a case, without a salt: its subject (where the config names one), its name, its
    voxels.

    Letter case, spaces around names, and how accents are encoded make no difference.
    """
    grouped = bool(config.subject or config.group_by or config.phantom)
    texts = {"subjects": [case.subject] if grouped else [], "names": [case.name], "voxels": list(voxels)}
    return {kind: frozenset(_mark(kind, text) for text in found) for kind, found in texts.items()}


def _mark(kind: str, text: str) -> str:
    return hashlib.sha256(f"{kind} {unicodedata.normalize('NFC', text).strip().casefold()}".encode()).hexdigest()


def _salted(salt: str, mark: str) -> str:
    return hashlib.sha256(f"{salt} {mark}".encode()).hexdigest()[:DIGITS]


def record_subjects(roles: Mapping[str, Iterable[Marks]]) -> SubjectRecord:
    """Make the record of one training. Its salt is a digest of all its marks. So the same training gives the same
    record, bit for bit, and a precomputed table of digests fits one data set at most.

    Args:
        roles: `marks_of` the cases that were "train" and "validation".
    """
    by_role = {role: list(roles.get(role, ())) for role in ROLES}
    content = [[sorted({*one[kind]}) for one in by_role[role] for kind in KINDS] for role in ROLES]
    salt = hashlib.sha256(json.dumps([sorted(rows) for rows in content]).encode()).hexdigest()[:32]

    def digests(role: str) -> dict[str, str]:
        by_kind = {kind: {_salted(salt, mark) for marks in by_role[role] for mark in marks[kind]} for kind in KINDS}
        return {kind: " ".join(sorted(values)) for kind, values in by_kind.items()}

    return {"salt": salt, "train": digests("train"), "validation": digests("validation")}


def join_records(*records: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Join the records of several parts, each once; `UNRECORDED` for a part without any."""
    joined = []
    for part in records:
        for record in part if part else [UNRECORDED]:
            if record not in joined:
                joined.append(_plain(record))
    return joined


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in record.items()}


def check_subjects(records: Any) -> None:
    """Raise ValueError unless `records` is None or a list of records."""
    if records is None:
        return
    if not isinstance(records, list | tuple) or not all(map(_is_record, records)):
        raise ValueError(
            "subjects is not a list of records of training subjects as train_vae.py and train_ldm.py write it"
        )


def check_marks(marks: Any) -> None:
    """Raise ValueError unless `marks` is a list from `marks_of`, as JSON holds it."""
    fit = isinstance(marks, list | tuple) and all(
        isinstance(one, Mapping)
        and set(one) <= set(KINDS)
        and all(
            isinstance(found, list | tuple | frozenset) and all(isinstance(m, str) for m in found)
            for found in one.values()
        )
        for one in marks
    )
    if not fit:
        raise ValueError("subjects are not as python -m evaluation.copies.fingerprints writes them")


def _is_record(record: Any) -> bool:
    if not isinstance(record, Mapping):
        return False
    if dict(record) == UNRECORDED:
        return True
    parts = [record.get(role) for role in ROLES]
    texts = [part.get(kind) if isinstance(part, Mapping) else None for part in parts for kind in KINDS]
    whole = set(record) == {"salt", *ROLES} and isinstance(record["salt"], str)
    return whole and all(isinstance(text, str) and re.fullmatch(r"[0-9a-f ]*", text) for text in texts)


def is_complete(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the records name everything that the model learned from."""
    return bool(records) and UNRECORDED not in [dict(record) for record in records]


def seen(records: Sequence[Mapping[str, Any]], marks: Marks, roles: Sequence[str]) -> tuple[str, str] | None:
    """Return the (role, kind) in which something with these marks is in the records, "voxels" before names; None if it
    is not."""
    for kind in ("voxels", "subjects", "names"):  # the surest first: equal voxels are never other people's
        for record in records:
            for role in roles if "salt" in record else ():
                known = _digests(record, role, kind)
                if known and any(_salted(record["salt"], mark) in known for mark in marks.get(kind, ())):
                    return role, kind
    return None


def unknown_volumes(records: Sequence[Mapping[str, Any]], marks: Sequence[Marks]) -> int:
    """Count the training volumes of the records that are not among those with these marks, neither by name nor by
    voxels.
    """
    missing = 0
    for record in records:
        if "salt" in record:
            left = [0]
            for kind in [kind for kind in ("names", "voxels") if _digests(record, "train", kind)]:
                held = {_salted(record["salt"], mark) for one in marks for mark in one.get(kind, ())}
                left.append(len(_digests(record, "train", kind) - held))
            missing += min(left[1:] or left)
    return missing


def _digests(record: Mapping[str, Any], role: str, kind: str) -> frozenset[str]:
    text = record[role][kind]
    if text not in _SPLIT:
        if len(_SPLIT) > 64:
            _SPLIT.clear()
        _SPLIT[text] = frozenset(text.split())
    return _SPLIT[text]


_SPLIT: dict[str, frozenset[str]] = {}  # texts of records as sets: thousands of cases are looked up one after another


def find_overlap(
    records: Sequence[Mapping[str, Any]],
    cases: Iterable[Case],
    config: DataConfig,
    voxels: Mapping[str, Sequence[str]] | None = None,
) -> list[Overlap]:
    """Find the cases that a model with these records must not be evaluated on: test cases that it learned from or that
    were used to monitor its training, and validation cases that it learned from.

    Args:
        voxels: `voxel_digests` of the cases that were read, by name.
    """
    found = []
    for case in cases:
        marks = marks_of(case, config, (voxels or {}).get(case.name, ()))
        if match := seen(records, marks, FORBIDDEN.get(case.split, ())):
            found.append(Overlap(case, *match))
    return found


def describe_overlap(found: Sequence[Overlap], model: str) -> str:
    """Explain which subjects of a test set a model has seen."""
    did = {"train": "learned from", "validation": "was chosen with"}
    by = {"subjects": "subject", "names": "name", "voxels": "equal voxels"}
    subjects: dict[str, Overlap] = {}
    for one in found:
        subjects.setdefault(one.case.subject, one)
    listed = [
        f"{subject} ({one.case.name}, {one.case.split} here, {one.role} there, identified by its {by[one.kind]})"
        for subject, one in list(subjects.items())[:MAX_NAMED]
    ]
    more = f" and {len(subjects) - MAX_NAMED} more" if len(subjects) > MAX_NAMED else ""
    verb = did["train" if any(one.role == "train" for one in found) else "validation"]
    return (
        f"{model}: {verb} {len(subjects)} subject{'s' if len(subjects) > 1 else ''} that "
        f"{'are' if len(subjects) > 1 else 'is'} held out here: {', '.join(listed)}{more}"
    )


REMEDY = (
    "use the split of its training: data.split, or data.test_fraction, data.validation_fraction and data.split_seed, "
    "with data.subject or data.group_by, as in the config.yaml of its run; or remove these subjects from the held-out "
    "splits"
)


def refuse_overlap(found: Sequence[Overlap], model: str, accept: str) -> None:
    """Raise ValueError if there is any overlap. `accept` says what to type if only the names are the same."""
    if found:
        raise ValueError(
            f"{describe_overlap(found, model)}. Measurements on them do not hold for new subjects: {REMEDY}. If they "
            f"are other people who only share names, {accept}"
        )
