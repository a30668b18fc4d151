"""Write the folders of the readers, and the key, which stays with whoever runs the study."""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from files.atomic import atomic_folder, write_text
from files.documents import read_object
from volumes.formats.read import is_volume_name, volume_stem

from .design import REAL, Item, Plan, StudyCase, match_masks, order_cases
from .questions import Question, asked
from .voxels import Grid, Look, as_script, common_grid, shown_voxels

KEY = "key.json"
KEY_FORMAT = "medvolume reader study: key"
VERSION = 1
DATE = 946684800  # 2000-01-01: the date of every file that a reader gets
PAGE_FILES = ("style.css", "viewer.js", "study.js")


@dataclass(frozen=True)
class StudyKey:
    """What the readers must not know.

    Attributes:
        study: the study's identity, which answers name.
        cases: volumes and their truth.
        readers: the items of each reader.
    """

    study: str
    cases: list[StudyCase]
    readers: dict[str, list[Item]]


def find_volumes(folder: Path) -> list[Path]:
    """Return the volumes directly in a folder, in the order of their names; hidden files are passed over.

    Raises: ValueError if there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder of volumes")
    found = sorted(path for path in folder.iterdir() if path.is_file() and is_volume_name(path.name))
    if not found:
        raise ValueError(f"{folder}: holds no volume (NIfTI, NRRD, MetaImage)")
    return found


def collect_cases(
    real: Sequence[Path], generated: Mapping[str, Sequence[Path]], most: int | None, seed: int
) -> list[StudyCase]:
    """Return the cases of a study: at most `most` of each source, generated ones first with those of shown real cases.

    Raises: ValueError for folders without volumes, a model called "real", two real volumes of one name, and a file that
        is given twice.
    """
    if REAL in generated:
        raise ValueError(f"--generated {REAL}=...: that name is taken; give the model another")
    names: dict[str, Path] = {}
    given: dict[Path, str] = {}
    for folder in real:
        for path in find_volumes(folder):
            _note(path, "--real", given)
            name = volume_stem(path)
            if name in names:
                raise ValueError(
                    f"{path}: has the name of {names[name]}, and masks are matched by names; rename one of the two, or "
                    f"give folders of different names of files: --real {path.parent}"
                )
            names[name] = path
    kept = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())[:most]
    cases = [StudyCase(name, str(names[name]), REAL) for name in sorted(kept)]
    for source, folders in generated.items():
        paths = [path for folder in folders for path in find_volumes(folder)]
        for path in paths:
            _note(path, f"--generated {source}", given)
        masks = {path: match_masks(list(names), volume_stem(path)) for path in paths}
        ranked = sorted(
            paths,
            key=lambda path: (masks[path] not in kept, hashlib.sha256(f"{seed}/{path.name}".encode()).hexdigest()),
        )
        cases += [StudyCase(volume_stem(path), str(path), source, masks[path]) for path in sorted(ranked[:most])]
    return cases


def _note(path: Path, option: str, given: dict[Path, str]) -> None:
    """Note which option gives a file. Raises: ValueError if one gave it before."""
    file = path.resolve()
    if file in given:
        raise ValueError(f"{path}: is given by {given[file]} and by {option}; give each folder once, real or generated")
    given[file] = option


def check_new(output: Path) -> None:
    """Raises: FileExistsError if the folder of a study exists."""
    if output.exists():
        raise FileExistsError(f"{output}: exists; readers may have it already, so give another folder")


def create_study(
    cases: Sequence[StudyCase],
    output: Path,
    *,
    plan: Plan,
    look: Look,
    title: str = "Readers' study",
    feedback: bool = True,
    salt: bytes | None = None,
) -> StudyKey:
    """Write `output`: a folder for each reader, and the key.

    Args:
        cases: see `collect_cases`.
        output: a new folder.
        plan: how many cases of each kind, and for how many readers.
        look: how volumes are shown.
        title: of the page.
        feedback: show the truth after each training case.
        salt: of names and noise; None: a new one. Tests give one.

    Raises: ValueError for volumes that cannot be used, and FileExistsError if `output` exists.
    """
    check_new(output)
    salt = secrets.token_bytes(32) if salt is None else salt
    readers = order_cases(cases, plan, salt)
    grid = common_grid(cases, look)
    study = hashlib.sha256(salt + b"study").hexdigest()[:16]
    with atomic_folder(output) as unfinished:
        for reader, items in readers.items():
            _write_reader(unfinished / reader, reader, items, cases, grid, look, (study, title, feedback, salt))
        key = {
            "format": KEY_FORMAT,
            "version": VERSION,
            "study": study,
            "title": title,
            "salt": salt.hex(),
            "plan": dataclasses.asdict(plan),
            "look": dataclasses.asdict(look),
            "grid": dataclasses.asdict(grid),
            "cases": [dataclasses.asdict(case) for case in cases],
            "readers": {reader: [dataclasses.asdict(item) for item in items] for reader, items in readers.items()},
        }
        write_text(unfinished / KEY, json.dumps(key, indent=1) + "\n", mode=0o600)
    return StudyKey(study, list(cases), readers)


def _write_reader(
    folder: Path,
    reader: str,
    items: Sequence[Item],
    cases: Sequence[StudyCase],
    grid: Grid,
    look: Look,
    common: tuple[str, str, bool, bytes],
) -> None:
    study, title, feedback, salt = common
    (folder / "volumes").mkdir(parents=True)
    shown = {name: case for item in items for name, case in zip(item.volumes, item.cases, strict=True)}
    for name in sorted(shown):  # so that the order of writing says nothing
        seed = int.from_bytes(hashlib.sha256(salt + name.encode()).digest()[:8], "big")
        voxels = shown_voxels(cases[shown[name]], grid, look, seed)
        (folder / "volumes" / f"{name}.js").write_text(as_script(name, voxels), encoding="ascii")
    for name in PAGE_FILES:
        (folder / name).write_text(files("reader_study.html").joinpath(name).read_text("utf-8"), encoding="utf-8")
    content = {
        "study": study,
        "reader": reader,
        "title": title,
        "shape": grid.shape,
        "spacing": grid.spacing,
        "questions": {section: [_question(one) for one in asked(section)] for section in ("single", "pair")},
        "items": [_shown_item(item, cases, feedback) for item in items],
    }
    environment = Environment(
        loader=PackageLoader("reader_study.html", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("index.html.jinja").render(title=title, reader=reader.replace("_", " "))
    data = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    (folder / "index.html").write_text(page, encoding="utf-8")
    (folder / "content.js").write_text(f"const CONTENT = {data};\n", encoding="ascii")
    for path in sorted([*folder.rglob("*"), folder], key=lambda path: -len(path.parts)):
        os.utime(path, (DATE, DATE))


def _question(question: Question) -> dict[str, object]:
    return dataclasses.asdict(question)


def _shown_item(item: Item, cases: Sequence[StudyCase], feedback: bool) -> dict[str, object]:
    """Return what the page may know of an item: not what it repeats, and its truth in training alone."""
    shown: dict[str, object] = {"id": item.id, "section": item.section, "volumes": item.volumes}
    if item.section == "training" and feedback:
        shown["truth"] = "R" if cases[item.cases[0]].source == REAL else "G"
    return shown


def read_key(path: Path) -> StudyKey:
    """Read `key.json`. Raises: ValueError for any other file."""
    key = read_object(path / KEY if path.is_dir() else path)
    if key.get("format") != KEY_FORMAT or key.get("version") != VERSION:
        raise ValueError(f"{path}: is not the key of a readers' study; give the {KEY} that `create` wrote")
    try:
        cases = [StudyCase(**case) for case in key["cases"]]
        readers = {
            reader: [
                Item(**{**item, "cases": tuple(item["cases"]), "volumes": tuple(item["volumes"])}) for item in items
            ]
            for reader, items in key["readers"].items()
        }
        for case in cases:
            if not all(isinstance(text, str) for text in (case.name, case.file, case.source)):
                raise ValueError(f"the case {case.name!r:.40} lacks a name, file or source")
        for item in (item for items in readers.values() for item in items):
            _check_item(item, len(cases))
        return StudyKey(key["study"], cases, readers)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({type(error).__name__}: {error}); take it from a copy") from error


def _check_item(item: Item, cases: int) -> None:
    """Raise ValueError for an item of a key that names no case, or another section than there are."""
    if item.section not in ("training", "single", "pair") or len(item.cases) != 1 + (item.section == "pair"):
        raise ValueError(f"item {item.id!r:.40} is not a training case, a volume or a pair")
    for number in item.cases:
        if type(number) is not int or not 0 <= number < cases:
            raise ValueError(f"item {item.id!r:.40} shows case {number!r:.40}, of {cases}")
