"""What the names of files alone say: cases, roles and patterns."""

from pathlib import Path

import pytest

from recipes.layouts.folders import find_folders, split_names
from recipes.listing import Listing


def found(*paths):
    """{role: pattern} and the cases of a folder with these files."""
    layout = find_folders(Listing(Path("scans"), tuple(sorted(paths)), (), (), ()))
    patterns = {}
    for file in layout.files:
        patterns.setdefault(file.role, set()).add(file.pattern)
    return (
        {role: sorted(one) for role, one in patterns.items()},
        ["/".join(v for _, v in key) for key in layout.keys],
        layout,
    )


CASES = [
    (  # BraTS: the patient's name is repeated in the files
        [f"BraTS_{n:03d}/BraTS_{n:03d}_{m}.nii.gz" for n in range(4) for m in ("t1", "t1ce", "flair", "seg")],
        {m: ["{subject}/{subject}_" + m + ".nii.gz"] for m in ("t1", "t1ce", "flair", "seg")},
        [f"BraTS_{n:03d}" for n in range(4)],
    ),
    (  # images and masks in folders of their own, below the patient
        [f"p{n}/{f}.nii.gz" for n in range(3) for f in ("anat/T1", "anat/T2", "seg/tumor")],
        {
            "anat/T1": ["{subject}/anat/T1.nii.gz"],
            "anat/T2": ["{subject}/anat/T2.nii.gz"],
            "seg/tumor": ["{subject}/seg/tumor.nii.gz"],
        },
        ["p0", "p1", "p2"],
    ),
    (  # dates as folders of visits, of other dates for everybody
        [f"p{n}/2020-0{n + v}-11/CT.nii.gz" for n in range(1, 4) for v in (1, 3)],
        {"CT": ["{subject}/{session}/CT.nii.gz"]},
        [f"p{n}/2020-0{n + v}-11" for n in range(1, 4) for v in (1, 3)],
    ),
    (  # a folder that all patients have
        [f"p{n}/scans/{m}.nrrd" for n in range(3) for m in ("CT", "PET")],
        {"scans/CT": ["{subject}/scans/CT.nrrd"], "scans/PET": ["{subject}/scans/PET.nrrd"]},
        ["p0", "p1", "p2"],
    ),
    (  # splits as folders
        [
            f"{s}/{k}/c{i}.nii.gz"
            for s, i in (("train", 1), ("train", 2), ("train", 3), ("test", 4))
            for k in ("images", "labels")
        ],
        {"images": ["{split}/images/{case}.nii.gz"], "labels": ["{split}/labels/{case}.nii.gz"]},
        ["test/c4", "train/c1", "train/c2", "train/c3"],
    ),
    (  # masks with an ending of their own
        [f"imgs/{n:03d}.nii.gz" for n in range(4)] + [f"segs/{n:03d}_seg.nii.gz" for n in range(4)],
        {"imgs": ["imgs/{case}.nii.gz"], "segs/seg": ["segs/{case}_seg.nii.gz"]},
        [f"{n:03d}" for n in range(4)],
    ),
    (  # beginnings that differ by folder
        [f"img/img{n}_{n}.nii" for n in range(3)] + [f"lab/img{n}_{n}.nii" for n in range(3)],
        {"img": ["img/{case}.nii"], "lab": ["lab/{case}.nii"]},
        [f"img{n}_{n}" for n in range(3)],
    ),
    (
        [f"images/img_{n:02d}.nii.gz" for n in range(4)] + [f"labels/lbl_{n:02d}.nii.gz" for n in range(4)],
        {"images/img": ["images/img_{case}.nii.gz"], "labels/lbl": ["labels/lbl_{case}.nii.gz"]},
        [f"{n:02d}" for n in range(4)],
    ),
    (  # the kind of file comes first
        [f"{m}_{n:02d}.nii.gz" for n in range(4) for m in ("CT", "mask")],
        {"CT": ["CT_{case}.nii.gz"], "mask": ["mask_{case}.nii.gz"]},
        [f"{n:02d}" for n in range(4)],
    ),
    ([f"volunteer{n}.mha" for n in range(3)], {"image": ["{case}.mha"]}, [f"volunteer{n}" for n in range(3)]),
    (  # as few patients as files of each
        ["anna/CT.nii.gz", "anna/mask.nii.gz", "bert/CT.nii.gz", "bert/mask.nii.gz"],
        {"CT": ["{subject}/CT.nii.gz"], "mask": ["{subject}/mask.nii.gz"]},
        ["anna", "bert"],
    ),
]


@pytest.mark.parametrize(("paths", "patterns", "cases"), CASES)
def test_cases_and_roles_of_names(paths, patterns, cases):
    roles, names, _ = found(*paths)
    assert (roles, names) == (patterns, cases)


def test_extra_files_fit_no_case():
    paths = [f"p{n}/{m}.nii.gz" for n in range(5) for m in ("CT", "mask")] + ["atlas.nii.gz", "p3/old_CT_try.nii.gz"]
    roles, names, layout = found(*paths)
    assert set(roles) == {"CT", "mask"} and len(names) == 5
    assert layout.notes == ["2 files fit no case, and are left out: atlas.nii.gz, p3/old_CT_try.nii.gz"]


def test_spellings_of_a_role_are_one():
    roles, names, _ = found("a/CT.nii.gz", "b/ct.nii.gz", "c/CT.NII.GZ")
    assert roles == {"CT": ["{subject}/CT.NII.GZ", "{subject}/CT.nii.gz", "{subject}/ct.nii.gz"]} and len(names) == 3


def test_names_without_a_scheme_are_refused():
    with pytest.raises(ValueError, match=r"no scheme was found.*--table FILE"):
        found("x/1.nii.gz", "x/deep/1.nii.gz", "y/7/6.nii.gz", "z.nii.gz", "x/y/z/k.nii.gz", "1.nii.gz")


def test_endings_that_a_surname_shares_are_no_roles():
    split = split_names(["anna_smith_ct", "john_smith_ct", "mary_jones_ct", "eva_kim_ct"])
    assert set(split.values()) == {("anna_smith", "ct"), ("john_smith", "ct"), ("mary_jones", "ct"), ("eva_kim", "ct")}


def test_dates_in_names_of_files():
    roles, names, _ = found(*(f"p{n}/{m}_2021{n}{n}.nii.gz" for n in range(3) for m in ("CT", "mask")))
    assert roles == {"CT": ["{subject}/CT_*.nii.gz"], "mask": ["{subject}/mask_*.nii.gz"]} and names == [
        "p0",
        "p1",
        "p2",
    ]
